"""Source `hub` against repositories on a local hub: the same records as from files, whatever the network does."""

import os
import re
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import datasets
import huggingface_hub
import pytest

from proofs.project import Project
from tests.fake_hub import (
    ANSWERS,
    CARD,
    FEATURES,
    INT,
    STRANGER,
    TEXT,
    TOKEN,
    Hosted,
    environment,
    lead_to,
    rows_of,
    serve,
    write_repository,
)
from vlm_vqa.cli import main
from vlm_vqa.data import records
from vlm_vqa.errors import UserError
from vlm_vqa.fetch.sources import hf_dataset as source
from vlm_vqa.fetch.sources import table as module
from vlm_vqa.fetch.write_records import fetch
from vlm_vqa.params import Columns, HubParams, HubRepository, HubTable, Source, load_params

NAME = "lmms-lab/VQAv2"
REVISION = "0123456789abcdef0123456789abcdef01234567"
SPLIT_NAMES = {"train": "train", "val": "validation"}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local hub, to which this process is led; nobody waits between tries."""
    with serve() as hub:
        lead_to(hub, tmp_path / "home", monkeypatch)
        hub.slept = []
        monkeypatch.setattr(time, "sleep", hub.slept.append)
        yield hub


@pytest.fixture
def made(hub, tmp_path, vqav2_folder, directory_params, monkeypatch):
    """What the tests share: `rows`, the `repository`'s folder, and `fetch` from it or from the `directory`."""

    class Made:
        folder = vqav2_folder()
        rows = rows_of(folder)
        repository = write_repository(tmp_path / "repository", rows)
        hosted = Hosted(repository, REVISION)
        pictures = tmp_path / "data" / "records.pictures"

        def fetch(self, name=NAME, revision=REVISION, split="train", table=None):
            pair = HubParams(HubRepository(name, revision, split), HubRepository(name, revision, "validation"))
            return fetch(directory_params(".", source=Source.HUB, hub=pair, table=table), tmp_path / "data" / "records")

        def directory(self):
            return fetch(directory_params(self.folder), tmp_path / "directory")

    datasets.disable_progress_bars()
    made = Made()
    (made.repository / "README.md").write_text(CARD)
    hub.hosted[f"datasets/{NAME}"] = made.hosted
    return made


def contents(folder):
    """Every question and image of some records."""
    images = [(image.image_id, image.data) for image in records.iter_images(folder)]
    return [list(records.load_questions(folder, split)) for split in records.SPLITS], images


def test_a_repository_gives_the_records_that_the_files_give(made, tmp_path):
    manifest = made.fetch()
    assert manifest["data_hash"] == made.directory()["data_hash"]
    assert contents(tmp_path / "data" / "records") == contents(tmp_path / "directory")
    assert manifest["source"] == "hub"
    assert manifest["origin"]["val"] == {"repository": NAME, "revision": REVISION, "split": "validation"}
    assert not made.pictures.exists(), "what was written out goes when the records are made"


def test_names_and_shapes_of_another_public_repository(made, tmp_path):
    """Multimodal-Fatima/VQAv2_train: id_image, bare answers beside the whole ones, more columns, no list of files."""
    for rows in made.rows.values():
        for row in rows:
            row["id_image"], row["id"], row["clip_tags_ViT_L_14"] = row.pop("image_id"), 0, ["a", "b"]
            row["answers_original"] = row["answers"]
            row["answers"] = [answer["answer"] for answer in row["answers"]]
    features = {key: value for key, value in FEATURES.items() if key != "image_id"}
    # Written so, the library gives an object of lists.
    original = datasets.Sequence(ANSWERS[0])
    more = {"id_image": INT, "id": INT, "clip_tags_ViT_L_14": [TEXT], "answers": [TEXT], "answers_original": original}
    made.hosted.folder = write_repository(
        tmp_path / "other",
        made.rows,
        {**features, **more},
        names="data/{split}-{index:05d}-of-{count:05d}-3eb8.parquet",
    )
    assert made.fetch()["data_hash"] == made.directory()["data_hash"]


@pytest.mark.parametrize("answers", ["multiple_choice_answer", "answers"])
def test_few_columns_and_bare_answers_are_enough(made, tmp_path, answers):
    """merve/vqav2-small has the main answer alone."""
    few = ("question", "image", answers)
    rows = {
        split: [
            {key: [answer["answer"] for answer in row[key]] if key == "answers" else row[key] for key in few}
            for row in rows
        ]
        for split, rows in made.rows.items()
    }
    features = {**FEATURES, "answers": [TEXT]}
    made.hosted.folder = write_repository(tmp_path / "small", rows, {key: features[key] for key in few})
    manifest = made.fetch()
    expected = list(records.load_questions((made.directory(), tmp_path / "directory")[1], "train"))
    found = list(records.load_questions(tmp_path / "data" / "records", "train"))
    for key in ("question", "multiple_choice_answer"):
        assert [row[key] for row in found] == [row[key] for row in expected]
    assert manifest["splits"]["train"]["answers_per_question"] == {"10" if answers == "answers" else "1": 12}
    assert found[0]["original_image_id"] == "COCO_train2014_000000000057.jpg"


def test_columns_of_ones_own_are_named(made, tmp_path):
    rows = {
        split: [{**row, "asked": row["question"], "question": "?"} for row in rows] for split, rows in made.rows.items()
    }
    made.hosted.folder = write_repository(tmp_path / "own", rows, {**FEATURES, "asked": TEXT})
    assert made.fetch(table=HubTable(columns=Columns(question="asked")))["data_hash"] == made.directory()["data_hash"]


def test_an_image_is_written_once(made, hub, monkeypatch):
    written = []
    write = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda path, data: (written.append(path.name), write(path, data))[1])
    made.fetch()
    images = [name for name in written if name.endswith(".jpg")]
    assert len(images) == len(set(images)) == 6


# --- interruptions ----------------------------------------------------------------------------------------------------


def test_interrupted_among_the_rows_it_downloads_nothing_again(made, hub, monkeypatch):
    read, rows = module.sha256_bytes, []

    def interrupted(data):
        rows.append(data)
        if len(rows) == 9:
            raise KeyboardInterrupt
        return read(data)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "sha256_bytes", interrupted)
        made.fetch()
    assert not made.pictures.exists()
    hub.requests.clear()
    assert made.fetch()["data_hash"] == made.directory()["data_hash"]
    assert not hub.asked_for("/storage/")


@pytest.mark.slow
def test_killed_while_it_downloads_the_stage_goes_on_and_ends_alike(made, hub, tmp_path):
    pair = {split: {"repository": NAME, "revision": REVISION, "split": name} for split, name in SPLIT_NAMES.items()}
    (tmp_path / "project").mkdir()
    project = Project(tmp_path / "project", {"data.source": "hub", "data.hub": pair})
    variables = environment(hub, tmp_path / "home")
    reached, release = threading.Event(), threading.Event()

    def hold(request):
        if "/storage/" in request.path and "train-00001-of" in request.path:
            while not list((tmp_path / "home").rglob("snapshots/*/data/train-00000-of*")):
                time.sleep(0.05)
            reached.set()
            release.wait(60)

    hub.fault = hold
    stage = subprocess.Popen(
        project.stage_command("fetch-vqav2"),
        shell=True,
        cwd=project.folder,
        env=project.environment(**variables),
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert reached.wait(60)
    finally:
        os.killpg(stage.pid, signal.SIGKILL)
        stage.wait()
        release.set()
    hub.fault = lambda request: None
    hub.requests.clear()
    done = project.stage("fetch-vqav2", **variables)
    assert done.returncode == 0, done.stderr
    assert not hub.asked_for("train-00000-of"), "the file that was whole is not downloaded again"
    assert hub.asked_for("train-00001-of")
    assert records.read_manifest(project.folder / "data" / "records")["data_hash"] == made.directory()["data_hash"]


def test_files_of_another_commit_are_not_taken_up(made, hub, monkeypatch, tmp_path):
    hub.fault = lambda request: 404 if "train-00001-of" in request.path else None
    with pytest.raises(UserError, match="answers 404"):
        made.fetch()
    hub.fault = lambda request: None
    for row in made.rows["train"]:
        row["question"] = "Now what?"
    made.hosted.folder = write_repository(tmp_path / "changed", made.rows)
    made.hosted.revision = "f" * 40
    made.fetch(revision="f" * 40)
    assert set(records.load_questions(tmp_path / "data" / "records", "train")["question"]) == {"Now what?"}


def test_what_breaks_the_contract_is_kept_for_the_next_run(made, hub, tmp_path):
    for row in made.rows["train"][:2]:
        row["answers"] = []
    made.hosted.folder = write_repository(tmp_path / "none", made.rows)
    words = rf"(?s)question without any answer: 2\..*data.hub.train.repository '{NAME}': row 1: its answers are \[\]"
    with pytest.raises(UserError, match=words):
        made.fetch()
    hub.requests.clear()
    with pytest.raises(UserError, match="question without any answer: 2"):
        made.fetch()
    assert not hub.asked_for("/storage/")


@pytest.mark.parametrize("fault", [503, 429, "drop"])
def test_a_failing_network_is_tried_again(made, hub, fault):
    failed = []
    hub.fault = lambda request: (
        (failed.append(request), fault)[1] if "/storage/" in request.path and len(failed) < 5 else None
    )
    assert made.fetch()["data_hash"] == made.directory()["data_hash"]
    assert len(failed) == 5 and hub.slept


def test_a_hub_that_stays_down_is_told_with_what_to_do(made, hub):
    hub.fault = lambda request: 503 if "/storage/" in request.path else None
    with pytest.raises(UserError, match=f"{hub.url} answers 503.*run the stage again, which goes on.*HF_ENDPOINT"):
        made.fetch()
    assert set(source._PAUSES) <= set(hub.slept)


def test_no_connection_is_told_with_what_to_do(made, hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(UserError, match="http://127.0.0.1:1 cannot be reached .*HF_ENDPOINT.*HF_HUB_OFFLINE=1"):
        made.fetch()


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_loading_script_is_refused_and_not_run(made, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_TRUST_REMOTE_CODE", True)
    (made.repository / "VQAv2.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(
        UserError, match="program of its own, VQAv2.py, which is not run.*refs/convert/parquet.*official"
    ):
        made.fetch()
    assert not (tmp_path / "ran").exists()


def no_answers(made, tmp_path):
    rows = {
        split: [{"question": row["question"], "image": row["image"]} for row in rows]
        for split, rows in made.rows.items()
    }
    made.hosted.folder = write_repository(tmp_path / "few", rows, {key: FEATURES[key] for key in ("question", "image")})


def images_elsewhere(made, tmp_path):
    for row in made.rows["train"]:
        row["image"] = {"bytes": None, "path": "http://images.example/1.jpg"}
    made.hosted.folder = write_repository(tmp_path / "elsewhere", made.rows)


def two_images_of_one_id(made, tmp_path):
    made.rows["train"][7]["image"] = made.rows["train"][0]["image"]
    made.hosted.folder = write_repository(tmp_path / "two", made.rows)


def damaged(made, tmp_path):
    file = made.repository / "data" / "train-00001-of-00002.parquet"
    file.write_bytes(file.read_bytes()[:-100])


def several_data_sets(made, tmp_path):
    card = CARD.replace("default", "balanced").replace("---\n#", "- config_name: abstract\n  data_files: x/*\n---\n#")
    (made.repository / "README.md").write_text(card)


def no_parquet(made, tmp_path):
    for file in made.repository.glob("data/train*"):
        file.rename(file.with_suffix(".csv"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_answers, "no column for the answers; it has question, image"),
        (images_elsewhere, "http://images.example/1.jpg: a URL, not a file. Download"),
        (two_images_of_one_id, "row 8: image_id '25' stands for 'COCO_train2014_0+25.jpg' before"),
        (damaged, "train-00001-of-00002.parquet: "),
        (several_data_sets, r"holds several data sets \(balanced, abstract\)"),
        (no_parquet, "has no Parquet files of split 'train'"),
    ],
)
def test_what_is_no_vqav2_is_refused_by_name(made, tmp_path, spoil, message):
    spoil(made, tmp_path)
    with pytest.raises(UserError, match=rf"(?s)(repository '{NAME}'|lmms-lab--VQAv2/|unreadable image).*{message}"):
        made.fetch()


def test_a_wrong_split_or_commit_is_named(made):
    with pytest.raises(UserError, match="data.hub.train.split is 'training'; lmms-lab/VQAv2 has train, validation"):
        made.fetch(split="training")
    page = re.escape(f"https://huggingface.co/datasets/{NAME}/commits/main")
    with pytest.raises(UserError, match=rf"no commit '{'e' * 40}' \(data.hub.train.revision\). {page}"):
        made.fetch(revision="e" * 40)


@pytest.mark.parametrize("token", [None, STRANGER])
@pytest.mark.parametrize(
    ("kind", "words"), [("gated", "is gated.*Accept its licence at"), ("private", "private or gated")]
)
def test_without_access_one_message_says_where_and_how(made, monkeypatch, kind, words, token):
    setattr(made.hosted, kind, True)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    page = f"https://huggingface.co/datasets/{NAME} "
    with pytest.raises(UserError, match=f"{words}.*{page}.*HF_TOKEN.*hf auth login") as caught:
        made.fetch()
    assert "secret" not in str(caught.value)


def test_the_token_opens_a_gated_repository_and_goes_to_the_hub_alone(made, hub, monkeypatch, tmp_path):
    made.hosted.gated = made.hosted.private = True
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    made.fetch()
    assert {request.authorization for request in hub.asked_for("/resolve/")} == {f"Bearer {TOKEN}"}
    assert {request.authorization for request in hub.asked_for("/storage/")} == {None}
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]


# --- without a network ------------------------------------------------------------------------------------------------


def test_offline_a_downloaded_repository_is_read_from_its_folder(made, hub, monkeypatch):
    huggingface_hub.snapshot_download(NAME, repo_type="dataset", revision=REVISION)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert made.fetch()["data_hash"] == made.directory()["data_hash"]
    assert not hub.requests


@pytest.mark.parametrize("there", ["nothing", "a part"])
def test_offline_what_is_not_there_is_told_with_the_command_that_brings_it(made, monkeypatch, there):
    if there == "a part":
        huggingface_hub.snapshot_download(NAME, repo_type="dataset", revision=REVISION, allow_patterns="*train*")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    command = f"hf download {NAME} --repo-type dataset --revision {REVISION}"
    with pytest.raises(UserError, match=f"HF_HUB_OFFLINE is set, and .* not, or not whole.*`{command}`"):
        made.fetch()


def test_init_names_the_newest_commit_and_the_splits(made, tmp_path, monkeypatch, capsys):
    root = Path(__file__).parents[2]
    for name in ("presets", "launch"):
        shutil.copytree(root / name, tmp_path / "project" / name)
    monkeypatch.chdir(tmp_path / "project")
    assert main(["init", NAME]) == 0
    params = load_params("params.yaml")
    assert params.data.hub == HubParams(
        HubRepository(NAME, REVISION, "train"), HubRepository(NAME, REVISION, "validation")
    )
    marked = [
        line for line in Path("params.yaml").read_text().splitlines() if "# unsure: the repository was not" in line
    ]
    assert [line.split(":")[0].strip() for line in marked] == ["text_length", "questions", "num_train_epochs"]
    assert main(["init", "no/such", "--force"]) == 2 and "the hub shows no such dataset" in capsys.readouterr().err
