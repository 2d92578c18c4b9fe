"""Passwords and tokens stay out of messages, logs, tracebacks and stores; addresses without any stay as they are."""

import subprocess
import sys
import textwrap
import traceback

import pytest
import yaml

from vlm_vqa.errors import UserError
from vlm_vqa.params import load_params, parse_params
from vlm_vqa.secrets import without_secrets
from vlm_vqa.tracking import describe

MASKED = {
    "http://me:sesame@host:5000/x": "http://host:5000/x",
    "http://sesame@host/": "http://host/",
    "http://:sesame@host": "http://host",
    "http://me:se/same@host/x": "http://host/x",
    "http://me:se@sa/me@host/x": "http://host/x",
    "http://me:ses'ame@host/": "http://host/",
    "postgresql://me:ses?a#me@host/db?password=sesame": "postgresql://host/db?***",
    "HTTP_PROXY=http://me:sesame@proxy:1": "HTTP_PROXY=http://proxy:1",
    "Failed to parse: me:sesame@proxy:port": "Failed to parse: proxy:port",
    "('http://me:sesame@proxy:1/x.zip', 'b@c')": "('http://proxy:1/x.zip', 'b@c')",
    "exceeded with url: /b/k?X-Amz-Signature=sesame&x=y (Caused by": "exceeded with url: /b/k?*** (Caused by",
    "(https://host/k?sig=sesame): it": "(https://host/k?***): it",
    "https://host/k?sesame.": "https://host/k?***.",
    "Illegal header value b'Bearer hf_sesame\\n'": "Illegal header value b'Bearer ***'",
}
KEPT = [
    "http://127.0.0.1:80/a@b", "http://[::1]:80/a@b", "hf://datasets/a/b@0123", "time 5:30 @home", "Is it red/blue?",
    "http://h:5000/#/experiments/1/runs?workflowType=ml&viewStateShareKey=scores", "sqlite:////a/b@c.db",
    "git@github.com:a/b.git", "COCO_train2014_{image_id:012d}.jpg", "step 3: loss is nan (rank 1: nan); grad_norm is nan",
]  # fmt: skip


@pytest.mark.parametrize("text", MASKED)
def test_secrets_are_masked_and_the_rest_stays(text):
    assert without_secrets(text) == MASKED[text]
    assert without_secrets(MASKED[text]) == MASKED[text]
    assert "sesame" not in without_secrets(f"a {text} b {text}")


@pytest.mark.parametrize("text", KEPT)
def test_what_holds_no_secret_stays(text):
    assert without_secrets(text) == text


def test_an_error_shows_none_of_its_own_nor_of_what_led_to_it():
    # Tracebacks show lines of this file.
    address, path = "http://me:sesame@host/", "/path?sig=sesame"
    with pytest.raises(UserError) as caught:
        try:
            try:
                raise ConnectionError(OSError(f"no route to {address}"))
            except ConnectionError as error:
                raise LookupError(path, 3) from error
        except LookupError as error:
            raise UserError(f"{address}: gone") from error
    shown = "".join(traceback.format_exception(caught.value))
    assert "sesame" not in shown and "no route to http://host/" in shown and "('/path?***', 3)" in shown


@pytest.mark.parametrize("where", ["log", "traceback", "thread"])
def test_nothing_that_a_stage_prints_shows_one(where):
    """What libraries say of addresses is not ours to write."""
    program = """
        import logging, threading, sys
        from vlm_vqa.pipeline import entrypoint

        def main():
            try:
                raise OSError("http://me:sesame@host/a: gone")
            except OSError:
                if sys.argv[1] == "log":
                    logging.getLogger("library").exception("asking %s", "http://me:sesame@host/b?sig=sesame")
                elif sys.argv[1] == "thread":
                    thread = threading.Thread(target=lambda: 1 / len([] or {}['http://me:sesame@host/b']))
                    thread.start()
                    thread.join()
                else:
                    raise RuntimeError("http://me:sesame@host/b?sig=sesame")

        entrypoint.run("it", main)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), where], capture_output=True, text=True, check=False
    )
    # The traceback's source lines are this program's own, not values: none, since it comes from -c.
    assert "sesame" not in done.stderr and "http://host/b" in done.stderr
    assert done.returncode == (where == "traceback")


def official(**urls):
    values = yaml.safe_load(open("presets/small.yaml"))
    values["data"] |= {"source": "official", "official": {
        "texts_url": "https://host/a", "images_url": "https://host/b", "keep_archives": True, "downloads": 1, **urls,
    }}  # fmt: skip
    return values


@pytest.mark.parametrize("url", ["https://me:sesame@host/a", "https://host/a?token=sesame", "me:sesame@host/a"])
@pytest.mark.parametrize("key", ["texts_url", "images_url"])
def test_parameter_files_with_secrets_are_refused_without_showing_them(key, url):
    parse_params(official())
    with pytest.raises(UserError, match=f"data.official.{key} holds a login or a query .*dvc.lock.*netrc") as caught:
        parse_params(official(**{key: url}))
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize("text", ["texts_url: [http://me:sesame@host/", "data: http://me:sesame@host/"])
def test_parameter_files_that_cannot_be_read_show_none(text, tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_params(path)
    assert "sesame" not in "".join(traceback.format_exception(caught.value))


def test_mlflow_is_told_none():
    assert describe.param_text("http://me:sesame@host/?sig=sesame") == "http://host/?***"
    assert describe.param_text(["http://me:sesame@host/"]) == '["http://host/"]'
