"""A model or data set that cannot be had is refused within seconds, in one line."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import kagglehub
import pytest

from gemma2_grpo.config import DataConfig
from gemma2_grpo.errors import UserError
from gemma2_grpo.model.hub.find import check_model, find_model
from gemma2_grpo.task import reach
from gemma2_grpo.task.examples import load_splits

FLAGSHIP = "google/gemma-2-2b-it"
ON_KAGGLE = "kaggle:google/gemma-2/transformers/gemma-2-2b-it"
TOKEN = "hf_aSecretThatNobodyMaySee"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
KAGGLE_DOWNLOADS = kagglehub.model_download, kagglehub.dataset_download
NO_TOKEN = (
    "HF_TOKEN is not set; make a token at huggingface.co/settings/tokens, accept Gemma's licence "
    f"at huggingface.co/{FLAGSHIP} and export HF_TOKEN, or attach the model on Kaggle"
)
NO_ACCESS = (
    "the account of this HF_TOKEN has no access; accept Gemma's licence at "
    f"huggingface.co/{FLAGSHIP}, and let a fine-grained token read public gated repositories"
)
REFUSED = (
    "Hugging Face refuses this HF_TOKEN; make a new token at huggingface.co/settings/tokens and "
    "export HF_TOKEN"
)
UNKNOWN = (
    "no such directory and no such repository on Hugging Face; check the spelling, or HF_TOKEN if "
    "it is private"
)


class Answers(BaseHTTPRequestHandler):
    """Answers with the status that the address begins with, or not at all."""

    def do_HEAD(self) -> None:
        self.server.asked.append(self.headers.get("Authorization"))  # type: ignore[attr-defined]
        kind = self.path.split("/")[1]
        if kind == "hang":
            self.server.closing.wait(20)  # type: ignore[attr-defined]
            return
        status, _, code = kind.partition("-")
        self.send_response(int(status))
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST = do_HEAD  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[ThreadingHTTPServer]:
    listening = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    listening.asked, listening.closing = [], threading.Event()  # type: ignore[attr-defined]
    listening.daemon_threads = True
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield listening
    listening.closing.set()  # type: ignore[attr-defined]
    listening.shutdown()
    listening.server_close()


@pytest.fixture
def address(server: ThreadingHTTPServer) -> str:
    server.asked.clear()  # type: ignore[attr-defined]
    return f"http://127.0.0.1:{server.server_port}"


@pytest.fixture(autouse=True)
def bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HF_HUB_ETAG_TIMEOUT", "KAGGLE_DATA_PROXY_URL", "TBE_RUNTIME_ADDR"):
        monkeypatch.delenv(name, raising=False)
    constants = "huggingface_hub.constants"
    monkeypatch.setattr(f"{constants}.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("KAGGLE_INPUT", str(tmp_path / "input"))
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "kagglehub"))
    monkeypatch.setattr(reach, "_SECONDS", 0.5)


@pytest.fixture
def mirror(address: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def use(kind: str) -> None:
        files = f"{address}/{kind}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"{address}/{kind}")
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", files)

    return use


def refusal(call: Callable[..., object], *arguments: object) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    text = str(caught.value)
    assert "\n" not in text and TOKEN not in text
    return text


def unused_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@pytest.mark.parametrize(
    ("kind", "with_token", "expected"),
    [
        ("401", False, NO_TOKEN),
        ("401", True, REFUSED),
        ("401-GatedRepo", True, NO_ACCESS),
        ("403", False, NO_TOKEN),
        ("403", True, NO_ACCESS),
        ("403-GatedRepo", True, NO_ACCESS),
        ("404", True, UNKNOWN),
        ("404-RepoNotFound", True, UNKNOWN),
        ("404-EntryNotFound", True, "no config.json in it; name a whole model"),
    ],
)
def test_what_the_hub_refuses(
    kind: str,
    with_token: bool,
    expected: str,
    mirror: Callable[[str], None],
    server: ThreadingHTTPServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if with_token:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    mirror(kind)
    said = refusal(check_model, FLAGSHIP)
    assert said == f"model {FLAGSHIP}: {expected}"
    asked = f"Bearer {TOKEN}" if with_token else None
    assert set(server.asked) == {asked}  # type: ignore[attr-defined]


def test_a_model_that_can_be_had_is_asked_for_once(
    mirror: Callable[[str], None], server: ThreadingHTTPServer
) -> None:
    mirror("200")
    check_model("someone/tiny")
    assert server.asked == [None]  # type: ignore[attr-defined]


def test_a_hub_that_does_not_answer(
    mirror: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    mirror("hang")
    start = time.monotonic()
    said = refusal(check_model, FLAGSHIP)
    assert time.monotonic() - start < 2
    assert said == (
        f"model {FLAGSHIP}: cannot be fetched (127.0.0.1: no answer within 0.5 s, and "
        "HF_HUB_ETAG_TIMEOUT=10 waits longer); check the network and run again, which resumes the "
        "download, or pass a local directory as model"
    )


def test_a_name_that_is_not_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    """No library has a limit on that; where packets are dropped it takes half a minute."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(5))
    huggingface_hub.close_session()
    start = time.monotonic()
    assert "huggingface.co: no answer within 0.5 s" in refusal(check_model, FLAGSHIP)
    assert "dataset openai/gsm8k: cannot be fetched (huggingface.co: no" in refusal(
        load_splits, DataConfig()
    )
    assert time.monotonic() - start < 3


def test_a_proxy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{unused_port()}")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    huggingface_hub.close_session()
    try:
        said = refusal(check_model, FLAGSHIP)
    finally:
        huggingface_hub.close_session()
    assert "cannot be fetched (huggingface.co by the proxy 127.0.0.1: " in said


@pytest.mark.parametrize("kind", ["hang", "401", "403", "503", "404"])
def test_a_cached_model_needs_no_hub(
    kind: str, mirror: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    mirror(kind)
    repository = tmp_path / "hub" / "models--google--gemma-2-2b-it"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (snapshot / name).write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    start = time.monotonic()
    check_model(FLAGSHIP)
    assert find_model(FLAGSHIP) == snapshot
    assert time.monotonic() - start < 3
    (snapshot / "tokenizer.json").unlink()
    refusal(check_model, FLAGSHIP)


def test_offline_mode_asks_nobody(
    mirror: Callable[[str], None], server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    mirror("200")
    said = "not complete in the cache of Hugging Face while HF_HUB_OFFLINE is set; unset it"
    assert f"model {FLAGSHIP}: {said}" in refusal(check_model, FLAGSHIP)
    assert server.asked == []  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("401", "Hugging Face refuses this HF_TOKEN; make a new token"),
        ("403", "cannot be fetched ("),
        ("503", "cannot be fetched (Server error '503 Service Unavailable'"),
        ("hang", "cannot be fetched (127.0.0.1: no answer within 0.5 s"),
    ],
)
def test_the_data_likewise(
    kind: str, expected: str, mirror: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    mirror(kind)
    start = time.monotonic()
    said = refusal(load_splits, DataConfig())
    assert said.startswith(f"dataset openai/gsm8k: {expected}")
    assert time.monotonic() - start < 2 and caplog.records == []


# --- Kaggle ---


@pytest.fixture
def kaggle(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kaggle does not answer, and its library is not to be waited for."""
    monkeypatch.setattr(reach, "_KAGGLE", f"{address}/hang")
    for name in ("model_download", "dataset_download"):
        monkeypatch.setattr(kagglehub, name, lambda *_, **__: time.sleep(20))


@pytest.mark.usefixtures("kaggle")
def test_kaggle_does_not_answer() -> None:
    start = time.monotonic()
    for call in (check_model, find_model):
        assert refusal(call, ON_KAGGLE) == (
            f"model {ON_KAGGLE}: cannot be fetched (no answer within 0.5 s, and "
            "HF_HUB_ETAG_TIMEOUT=10 waits longer); attach it to the notebook, check the network, "
            "or pass a local directory as model"
        )
    said = refusal(load_splits, DataConfig(dataset="kaggle:someone/gsm8k"))
    assert said.startswith("dataset kaggle:someone/gsm8k: cannot be fetched (no answer within 0.5")
    assert time.monotonic() - start < 4


@pytest.mark.usefixtures("kaggle")
def test_kagglehubs_cache_needs_no_kaggle(tmp_path: Path) -> None:
    variation = tmp_path / "kagglehub/models/google/gemma-2/transformers/gemma-2-2b-it"
    for version in ("9", "10", "11"):
        (variation / version).mkdir(parents=True)
        for name in ("config.json", "tokenizer.json", "model.safetensors"):
            (variation / version / name).write_text("{}")
    for version in ("9", "10"):  # Of 11, not all has come.
        (variation / f"{version}.complete").touch()
    check_model(ON_KAGGLE)
    assert find_model(ON_KAGGLE) == variation / "10"
    assert find_model(f"{ON_KAGGLE}/9") == variation / "9"
    data = tmp_path / "kagglehub/datasets/someone/gsm8k"
    (data / "versions" / "3").mkdir(parents=True)
    (data / "3.complete").touch()
    assert "dataset kaggle:someone/gsm8k: no train file in it" in refusal(
        load_splits, DataConfig(dataset="kaggle:someone/gsm8k")
    )


def test_kaggles_words_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real library, and a port where nobody listens."""
    monkeypatch.setenv("KAGGLE_API_ENVIRONMENT", "LOCALHOST")
    said = refusal(check_model, ON_KAGGLE)
    assert said.startswith(
        f"model {ON_KAGGLE}: cannot be fetched (Failed to establish a new connection: "
    )


# --- The command ---


@pytest.mark.parametrize(
    "command",
    [
        ["train", "gemma2-2b-v5e8", "--run", "run"],
        ["evaluate", FLAGSHIP],
        ["ask", FLAGSHIP, "1 + 1?"],
    ],
    ids=lambda command: command[0],
)
def test_the_command_says_one_line_and_leaves_nothing(command: list[str], tmp_path: Path) -> None:
    environment = os.environ | {
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": TOKEN,
        "HF_ENDPOINT": f"http://127.0.0.1:{unused_port()}",
    }
    work = tmp_path / "work"
    work.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "gemma2_grpo.cli", *command],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: model {FLAGSHIP}: cannot be fetched (127.0.0.1: ")
    assert len(done.stderr.splitlines()) == 1 and list(work.iterdir()) == []
