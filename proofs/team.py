"""A team's servers for real: two clones share runs, models and data; servers die meanwhile; no password is left anywhere.

    python -m proofs.team [--folder FOLDER]

Needs PostgreSQL's programs (Debian: `apt install postgresql`) and the extra `team`; docs/team.md has both. PostgreSQL, an
S3 store (moto's server) and MLflow's server with basic auth run on loopback. Anna trains, pushes to the DVC remote in the S3
store and to git; Ben clones, pulls, and records nothing twice. Then Ben trains while MLflow's server is killed, Anna while
the database is restarted, and Ben with a wrong password. Every training is to end, and `vlm-vqa track` to record what was
missed. At the end all passwords are looked for: in the dumps of both databases, the S3 store, the servers' and stages'
logs, the clones and, all the time, the command lines of all processes. Trained is on VQAv2's sample:
no score means anything.
"""

import importlib.util
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import requests
import yaml

from benchmarks import measure, vqav2
from benchmarks.measure import Claim
from proofs import tree
from proofs.project import ROOT, Project, own_sample, workplace
from vlm_vqa.errors import UserError

PACKAGES = ("boto3", "psycopg2", "flask_wtf", "dvc_s3", "moto")
DATABASES, BUCKETS = ("mlflow", "mlflow_auth"), ("mlflow", "dvc")
SECRETS = ("postgres", "admin", "anna", "ben", "wrong", "s3", "cookies")
PATIENCE = 600.0
# Long enough for a server to go in the middle of it.
CHANGES = {"train.num_train_epochs": 3, "train.save_steps": 100, "evaluation.helm_instances": 5}
EXPERIMENT = "vlm-vqa"


class Servers:
    """PostgreSQL, the S3 store and MLflow's server. Passwords reach them by their environments alone, and one by a file."""

    def __init__(self, folder: Path, words: Mapping[str, str]):
        self.words, self.logs = words, folder / "logs"
        self.logs.mkdir()
        self._running: dict[str, subprocess.Popen] = {}
        self._ports = {name: free_port() for name in ("postgres", "s3", "mlflow")}
        self.url = f"http://127.0.0.1:{self._ports['mlflow']}"
        self.s3 = f"http://127.0.0.1:{self._ports['s3']}"
        self.keys = {
            "AWS_ACCESS_KEY_ID": "team",
            "AWS_SECRET_ACCESS_KEY": words["s3"],
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        # libpq reads the password there, so no address holds it.
        self.database = {"PGPASSWORD": words["postgres"], "PGHOST": "127.0.0.1", "PGUSER": "postgres"}
        self.database["PGPORT"] = str(self._ports["postgres"])
        # PostgreSQL refuses to be root; Debian's package makes this user. Its folder has to be reachable for that one.
        self._user = "postgres" if os.geteuid() == 0 else None
        self.data = Path(tempfile.mkdtemp(prefix="proofs-team-"))
        self._auth = folder / "basic_auth.ini"
        # The servers of compose.yaml: what people with Docker get is what is tried here.
        text = (ROOT / "compose.yaml").read_text(encoding="utf-8")
        compose = yaml.safe_load(text.replace("@postgres:5432", f"@127.0.0.1:{self._ports['postgres']}"))
        self._auth.write_text(compose["configs"]["basic_auth"]["content"], encoding="utf-8")
        here = {"--host=0.0.0.0": "--host=127.0.0.1", "--port=5000": f"--port={self._ports['mlflow']}"}
        command = [here.get(word, word) for word in compose["services"]["mlflow"]["command"]]
        self._mlflow = [program(command[0]), *command[1:], "--workers=1"]

    def __enter__(self) -> "Servers":
        try:
            self._begin()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _begin(self) -> None:
        """Make the database, buckets and users, and start all."""
        password = self.data / "password"
        password.write_text(self.words["postgres"], encoding="utf-8")
        if self._user:
            for path in (self.data, password):
                shutil.chown(path, self._user)
        how = ["--auth=scram-sha-256", f"--pwfile={password}", "--username=postgres", "--encoding=UTF8"]
        made = self._call([postgres("initdb"), "--no-sync", *how, "--pgdata", str(self.data / "db")], user=self._user)
        password.unlink()
        if made.returncode:
            raise UserError(f"initdb failed: {made.stderr[-500:]}")
        self.start("postgres")
        self.start("s3")
        import boto3

        for name in BUCKETS:
            self.bucket(boto3).create_bucket(Bucket=name)
        for name in DATABASES:
            assert self._call([postgres("createdb"), name]).returncode == 0
        self.start("mlflow")
        for name in ("anna", "ben"):
            user = {"username": name, "password": self.words[name]}
            self.ask("2.0/mlflow/users/create", user, ("admin", self.words["admin"]))

    def __exit__(self, *_: object) -> None:
        for name in reversed(list(self._running)):
            self.stop(name, signal.SIGKILL)
        shutil.rmtree(self.data, ignore_errors=True)

    def bucket(self, boto3: Any) -> Any:
        """Return a client of the S3 store."""
        key, secret = self.keys["AWS_ACCESS_KEY_ID"], self.keys["AWS_SECRET_ACCESS_KEY"]
        where = {"endpoint_url": self.s3, "region_name": "us-east-1"}
        return boto3.client("s3", aws_access_key_id=key, aws_secret_access_key=secret, **where)

    def start(self, name: str) -> None:
        """Start a server and wait until it answers."""
        port = str(self._ports[name])
        commands = {
            "postgres": [postgres("postgres"), "-D", str(self.data / "db"), "-p", port, "-h", "127.0.0.1", "-k", ""],
            "s3": [program("moto_server"), "-H", "127.0.0.1", "-p", port],
            "mlflow": self._mlflow,
        }
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.logs),
            **(self.keys | self.database if name == "mlflow" else {}),
            "MLFLOW_S3_ENDPOINT_URL": self.s3,
            "MLFLOW_AUTH_CONFIG_PATH": str(self._auth),
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        if name == "mlflow":
            environment["MLFLOW_AUTH_ADMIN_PASSWORD"] = self.words["admin"]
            environment["MLFLOW_FLASK_SERVER_SECRET_KEY"] = self.words["cookies"]
        with (self.logs / f"{name}.txt").open("ab") as log:
            self._running[name] = subprocess.Popen(
                commands[name],
                env=environment,
                cwd=self.data if name == "postgres" else self.logs,
                user=self._user if name == "postgres" else None,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        ready = {
            "postgres": self._database_answers,
            "s3": lambda: listens(self._ports["s3"]),
            "mlflow": self._mlflow_answers,
        }
        until(ready[name], f"{name} answers", self._running[name])

    def stop(self, name: str, number: signal.Signals) -> None:
        """End a server and all its processes by a signal."""
        process = self._running.pop(name)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number) if number is signal.SIGKILL else process.send_signal(number)
        process.wait(PATIENCE)

    def _database_answers(self) -> bool:
        return self._call([postgres("psql"), "-c", "select 1", "postgres"]).returncode == 0

    def _mlflow_answers(self) -> bool:
        with suppress(requests.RequestException):
            return requests.get(f"{self.url}/health", timeout=5).ok
        return False

    def _call(self, command: Sequence[str], user: str | None = None) -> subprocess.CompletedProcess:
        environment = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", **(self.database if user is None else {})}
        return subprocess.run(
            command, capture_output=True, text=True, env=environment, user=user, cwd=self.data, check=False
        )

    def dump(self, name: str) -> str:
        """Return a database as SQL."""
        done = self._call([postgres("pg_dump"), name])
        assert done.returncode == 0, done.stderr
        return done.stdout

    def ask(self, path: str, body: Mapping[str, Any], who: tuple[str, str]) -> dict[str, Any]:
        """Post to MLflow's REST interface."""
        answer = requests.post(f"{self.url}/api/{path}", json=body, auth=who, timeout=60)
        answer.raise_for_status()
        return answer.json()

    def runs(self) -> list[dict[str, Any]]:
        """Return the runs of the experiment, newest first: `info`, and tags, params and last metrics as mappings."""
        admin = ("admin", self.words["admin"])
        found = requests.get(
            f"{self.url}/api/2.0/mlflow/experiments/get-by-name",
            params={"experiment_name": EXPERIMENT},
            auth=admin,
            timeout=60,
        )
        if not found.ok:
            return []
        asked = {"experiment_ids": [found.json()["experiment"]["experiment_id"]], "order_by": ["start_time DESC"]}
        runs = self.ask("2.0/mlflow/runs/search", asked, admin).get("runs", [])
        named = {"tags": "value", "metrics": "value", "params": "value"}
        return [
            {"info": run["info"]}
            | {kind: {one["key"]: one[value] for one in run["data"].get(kind, [])} for kind, value in named.items()}
            for run in runs
        ]

    def steps(self, run_id: str, metric: str = "loss") -> list[int]:
        """Return the steps at which a run has a metric."""
        found = requests.get(
            f"{self.url}/api/2.0/mlflow/metrics/get-history",
            params={"run_id": run_id, "metric_key": metric},
            auth=("admin", self.words["admin"]),
            timeout=60,
        )
        return [one["step"] for one in found.json().get("metrics", [])]


class Watch:
    """Looks for words in the command lines of all processes until it is left; `found` are those that were seen."""

    def __init__(self, words: Iterable[str]):
        self.words, self.found, self.looks = set(words), set[str](), 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self._stop.wait(0.2):
            self.looks += 1
            for process in psutil.process_iter():
                with suppress(psutil.Error):
                    line = "\0".join(process.cmdline())
                    self.found |= {word for word in self.words if word in line}

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def free_port() -> int:
    """Return a port that nobody listens on just now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def listens(port: int) -> bool:
    """Whether somebody listens on a port of this machine."""
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def until(ready: Callable[[], bool], what: str, process: subprocess.Popen | None = None) -> None:
    """Wait for something; UserError if it takes too long or the process ends before."""
    deadline = time.monotonic() + PATIENCE
    while not ready():
        if time.monotonic() > deadline or (process is not None and process.poll() is not None):
            raise UserError(f"not so after {PATIENCE:.0f} s, or its process has ended: {what}. See its log.")
        time.sleep(0.2)


def program(name: str) -> str:
    """Return a program of this environment."""
    return str(Path(sys.executable).parent / name)


def postgres(name: str) -> str:
    """Return one of PostgreSQL's programs; Debian keeps the newest outside PATH."""
    debian = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    found = shutil.which(name) if not debian else str(debian[-1])
    if found is None:
        raise UserError(f"{name} is not here: install PostgreSQL (Debian: apt install postgresql).")
    return found


def check_installed() -> None:
    """Raise UserError unless all that this proof starts is here."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"not installed: {', '.join(missing)}. Install them in a copy of the environment:"
            " pip install -c constraints.txt -e '.[dev]'"
        )
    postgres("initdb")


def holding(word: str, texts: Iterable[tuple[str, bytes]]) -> list[str]:
    """Return the names of the texts that hold a word."""
    return [name for name, text in texts if word.encode() in text]


def files(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of every file below a folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            yield str(path.relative_to(folder)), path.read_bytes()


def stored(servers: Servers) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of all that the servers keep: objects, databases."""
    import boto3

    client = servers.bucket(boto3)
    for bucket in BUCKETS:
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
            for one in page.get("Contents", []):
                yield f"s3://{bucket}/{one['Key']}", client.get_object(Bucket=bucket, Key=one["Key"])["Body"].read()
    for name in DATABASES:
        yield f"database {name}", servers.dump(name).encode()


class Person:
    """A clone, and what its owner's shell has: an own login on MLflow's server, the team's keys of the S3 store."""

    def __init__(self, name: str, project: Project, servers: Servers, folder: Path):
        self.name, self.project, self._servers, self._calls = name, project, servers, 0
        self.environment = {
            **servers.keys,
            "MLFLOW_TRACKING_URI": servers.url,
            "MLFLOW_TRACKING_USERNAME": name,
            "MLFLOW_TRACKING_PASSWORD": servers.words[name],
            "DVC_SITE_CACHE_DIR": str(folder / f"{name}-site"),
            **{f"GIT_{who}_{what}": f"{name}@team" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
        }

    def call(self, command: str, wanted: int = 0, **more: str) -> str:
        """Run a command to its end; its output stays in a log. Raises UserError if it does not end as `wanted`."""
        with self.start(command, **more) as call:
            return self.end(call, command, wanted)

    @contextmanager
    def start(self, command: str, **more: str) -> Generator[tree.Call]:
        """Run a command beside what the caller does."""
        self._calls += 1
        output = self._servers.logs / f"{self.name}-{self._calls:02}.txt"
        environment = self.project.environment(**self.environment | more)
        with tree.Call(command, self.project.folder, environment, output) as call:
            yield call

    def end(self, call: tree.Call, command: str, wanted: int = 0) -> str:
        """Wait for a command's end and return its output."""
        wrong = call.end(900)
        if wrong or call.shell.returncode != wanted:
            state = wrong or measure.ended(call.shell.returncode)
            raise UserError(f"{self.name}: `{command}`: {state}\n{call.text()[-3000:]}")
        return call.text()

    def during_training(self, command: str, happens: Callable[[], None]) -> str:
        """Run a command that trains; something happens when the server has the first steps of a new run."""
        before = {run["info"]["run_id"] for run in self._servers.runs()}

        def begun() -> bool:
            new = [run for run in self._servers.runs() if run["info"]["run_id"] not in before]
            return any(len(self._servers.steps(run["info"]["run_id"])) > 2 for run in new)

        with self.start(command) as call:
            until(begun, f"{self.name}'s training has begun", call.shell)
            happens()
            return self.end(call, command)


def exactly(what: str, found: float, wanted: float) -> Claim:
    """Return the claim that a number is another."""
    return Claim(what, found, found, found, wanted, at_most=found >= wanted)


def newest(servers: Servers) -> dict[str, Any]:
    """Return the newest run."""
    return servers.runs()[0]


def recorded(servers: Servers, run: Mapping[str, Any], steps: int) -> bool:
    """Whether a run has ended, with each step once and the evaluation's scores."""
    whole = servers.steps(run["info"]["run_id"]) == list(range(1, steps + 1))
    return (
        run["info"]["status"] == "FINISHED" and whole and "bleu_1" in run["metrics"] and "weights_hash" in run["tags"]
    )


def share(folder: Path, servers: Servers) -> tuple[Person, Person, list[Claim]]:
    """Anna trains and pushes, Ben clones and pulls: one run, the same bytes."""
    project = Project(folder / "anna", {**own_sample(folder), **CHANGES})
    anna = Person("anna", project, servers, folder)
    shutil.copy(ROOT / ".gitignore", project.folder)
    origin = folder / "origin.git"
    anna.call(f"git init --quiet --bare {origin} && git remote add origin {origin}")
    anna.call(f"dvc remote add --default team s3://dvc/cache && dvc remote modify team endpointurl {servers.s3}")
    anna.call("dvc repro")
    anna.call("dvc push")
    anna.call("git add --all && git commit --quiet -m first && git push --quiet origin HEAD:main")
    subprocess.run(["git", "clone", "--quiet", "--branch", "main", origin, folder / "ben"], check=True)
    ben = Person("ben", Project.at(folder / "ben"), servers, folder)
    ben.call("dvc pull")
    said = ben.call("dvc repro")
    ben.call("vlm-vqa track")
    same = [(folder / name / "models/export/model.safetensors").read_bytes() for name in ("anna", "ben")]
    return anna, ben, [
        exactly("stages that ran in the second clone after dvc pull", said.count("Running stage"), 0),
        exactly("exports that differ between the clones", same[0] != same[1], 0),
        exactly("runs after both have recorded it", len(servers.runs()), 1),
    ]  # fmt: skip


def troubles(anna: Person, ben: Person, servers: Servers) -> list[Claim]:
    """Ben's server is killed, Anna's database restarted, Ben's password wrong, each in the middle of a training."""
    steps = len(servers.steps(newest(servers)["info"]["run_id"]))

    ben.project.set({"train.learning_rate": 4e-3})
    said = ben.during_training("dvc repro", lambda: servers.stop("mlflow", signal.SIGKILL))
    warned = "does not take this run" in said
    servers.start("mlflow")
    lost = newest(servers)
    had = len(servers.steps(lost["info"]["run_id"]))
    ben.call("vlm-vqa track")
    runs = servers.runs()
    claims = [
        exactly("server killed: trainings that ended, with a warning", warned, 1),
        Claim("server killed: steps it had of them", had, had, had, steps - 1, at_most=True, note=f"of {steps}"),
        exactly("server killed: runs that `vlm-vqa track` completed", recorded(servers, runs[0], steps), 1),
        exactly("server killed: runs beside it", len(runs) - 2, 0),
    ]

    anna.project.set({"train.learning_rate": 5e-3})

    def restart() -> None:
        servers.stop("postgres", signal.SIGINT)
        time.sleep(5)
        servers.start("postgres")

    anna.during_training("dvc repro", restart)
    anna.call("vlm-vqa track")
    runs = servers.runs()
    claims += [
        exactly("database restarted: runs that are whole", recorded(servers, runs[0], steps), 1),
        exactly("database restarted: runs beside it", len(runs) - 3, 0),
    ]

    ben.project.set({"train.learning_rate": 6e-3})
    said = ben.call("dvc repro", MLFLOW_TRACKING_PASSWORD=servers.words["wrong"])
    claims.append(exactly("wrong password: runs that the server took", len(servers.runs()) - 3, 0))
    ben.call("vlm-vqa track", 2, MLFLOW_TRACKING_PASSWORD=servers.words["wrong"])
    ben.call("vlm-vqa track")
    runs = servers.runs()
    claims += [
        exactly("wrong password: trainings that ended, with a warning", "does not take this run" in said, 1),
        exactly("wrong password: runs that `vlm-vqa track` recorded", recorded(servers, runs[0], steps), 1),
    ]
    return claims


def choose(anna: Person, ben: Person) -> list[Claim]:
    """Ben pushes his model; Anna compares it with hers, asks it by its registered name and promotes it."""
    ben.call("git checkout --quiet -b ben && git add --all && git commit --quiet -m ben && dvc push")
    ben.call("git push --quiet origin ben")
    anna.call("git checkout --quiet -- . && git fetch --quiet origin && git checkout --quiet ben && dvc pull --force")
    compared = anna.call("vlm-vqa compare --base origin/main --tolerance 1")
    said = anna.call(
        f"vlm-vqa ask $(ls ../{vqav2.SAMPLE}/images/* | head -1) 'What is this?' --json --model models:/vlm-vqa/latest"
    )
    claims = [
        exactly("comparisons that name a score", "vqa_accuracy" in compared or "VQA accuracy" in compared, 1),
        exactly("answers of the registered model", "probability" in said, 1),
    ]
    if "promote" in anna.call("vlm-vqa --help"):
        said = anna.call("vlm-vqa promote 1")
        claims.append(exactly("champions", "champion now" in said, 1))
    return claims


def main(arguments: Sequence[str] | None = None) -> None:
    """Run it all, and write `team.json`."""
    parser = measure.parser("team", __doc__, "proofs")
    parser.add_argument("--folder", type=Path, help="keep clones and logs there; by default a temporary folder")
    options = measure.parse(parser, arguments)
    check_installed()
    words = {name: secrets.token_hex(12) for name in SECRETS}
    begun = time.monotonic()
    with workplace(options.folder) as folder, Servers(folder, words) as servers, Watch(words.values()) as watch:
        anna, ben, claims = share(folder, servers)
        claims += troubles(anna, ben, servers)
        claims += choose(anna, ben)
        texts = [*files(folder), *stored(servers)]
        places = {name: holding(word, texts) for name, word in words.items()}
        runs = len(servers.runs())
    claims += [
        exactly(f"places with a password, of {len(texts)} files, objects and dumps", sum(map(len, places.values())), 0),
        exactly(f"passwords in a command line, of {watch.looks} looks at all processes", len(watch.found), 0),
    ]
    seconds = round(time.monotonic() - begun)
    details = {"runs": runs, "seconds": seconds, "places with a password": places}
    measure.write("team", claims, details, {"questions and pictures": vqav2.SAMPLE})


if __name__ == "__main__":
    main()
