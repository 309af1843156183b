"""Models are found where they are, and what is missing is said in one line, without tokens."""

import errno
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import huggingface_hub
import kagglehub
import pytest
import requests
from huggingface_hub.errors import GatedRepoError
from huggingface_hub.utils._http import default_client_factory
from kagglehub.exceptions import DataCorruptionError, KaggleApiHTTPError

from gemma2_grpo.errors import UserError
from gemma2_grpo.model.hub import find as fetch
from gemma2_grpo.model.hub.find import check_files, find_model

FLAGSHIP = "google/gemma-2-2b-it"
ON_KAGGLE = "kaggle:google/gemma-2/transformers/gemma-2-2b-it"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_aSecretThatNobodyMaySee"
INDEX = "model.safetensors.index.json"
MODEL_DOWNLOAD = kagglehub.model_download
NO_TOKEN = (
    f"model {FLAGSHIP}: HF_TOKEN is not set; make a token at huggingface.co/settings/tokens, "
    f"accept Gemma's licence at huggingface.co/{FLAGSHIP} and export HF_TOKEN, or attach the model "
    "on Kaggle"
)
NO_ACCESS = (
    f"model {FLAGSHIP}: the account of this HF_TOKEN has no access; accept Gemma's licence at "
    f"huggingface.co/{FLAGSHIP}, and let a fine-grained token read public gated repositories"
)
OFFLINE = (
    f"model {FLAGSHIP}: not complete in the cache of Hugging Face while HF_HUB_OFFLINE is set; "
    "unset it, or pass a local directory as model"
)


def make_model(directory: Path, *names: str) -> Path:
    """A directory with files of those names, or with those of a whole model."""
    for name in names or ("config.json", "tokenizer.json", "model.safetensors"):
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    return directory


def make_sharded(directory: Path, shards: int) -> Path:
    names = [f"model-{i:05}-of-{shards:05}.safetensors" for i in range(1, shards + 1)]
    make_model(directory, "config.json", "tokenizer.json", *names)
    weights = {f"layer.{i}.weight": name for i, name in enumerate(names * 2)}
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    return directory


def cache_model(home: Path, name: str) -> Path:
    """A model as huggingface_hub leaves it in its cache: links to blobs, and a listing."""
    storage = home / "hub" / f"models--{name.replace('/', '--')}"
    blobs = make_model(storage / "blobs")
    snapshot = storage / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(Path("../../blobs") / blob.name)
    (storage / "refs").mkdir()
    (storage / "refs" / "main").write_text(COMMIT)
    listing = {path.name: {"size": 2, "blob_id": "0"} for path in blobs.iterdir()}
    (storage / "trees").mkdir()
    (storage / "trees" / f"{COMMIT}.json").write_text(
        json.dumps({"format_version": 1, "files": listing})
    )
    return snapshot


def message(name: object, call: Callable = find_model) -> str:
    with pytest.raises(UserError) as caught:
        call(name)
    text = str(caught.value)
    assert "\n" not in text and TOKEN not in text
    assert caught.value.__cause__ is None
    return text


def raising(error: Exception) -> Callable:
    def call(*_, **__):
        raise error

    return call


@pytest.fixture(autouse=True)
def bare_machine(tmp_path, monkeypatch) -> None:
    """No token, no login, no cache, no attached models, and no network."""
    for name in ("HF_TOKEN", "HF_OIDC_RESOURCE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(kagglehub, "model_download", raising(AssertionError("kagglehub is used")))
    monkeypatch.setenv("KAGGLE_INPUT", str(tmp_path / "input"))
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "kagglehub"))


@pytest.fixture
def hub():
    """Puts a function of requests in the place of huggingface.co, under the real library."""

    def use(answer: Callable[[httpx.Request], httpx.Response]) -> None:
        transport = httpx.MockTransport(answer)
        huggingface_hub.set_client_factory(
            lambda: httpx.Client(transport=transport, follow_redirects=True)
        )

    yield use
    huggingface_hub.set_client_factory(default_client_factory)


def refusal(status: int, code: str = "", text: str = "") -> Callable[..., httpx.Response]:
    headers = {"X-Error-Code": code, "X-Error-Message": text}
    return lambda _: httpx.Response(status, headers={k: v for k, v in headers.items() if v})


def serving(files: dict[str, bytes], asked: list[str]) -> Callable[..., httpx.Response]:
    """A hub that has one repository, of those files, and notes which files are asked for."""

    def answer(request: httpx.Request) -> httpx.Response:
        path = request.url.path
        if "/revision/" in path:
            return httpx.Response(200, json={"id": "x/y", "sha": COMMIT, "siblings": []})
        if "/tree/" in path:
            sizes = [
                {"type": "file", "path": n, "size": len(b), "oid": n} for n, b in files.items()
            ]
            return httpx.Response(200, json=sizes)
        name = path.split(f"/resolve/{COMMIT}/")[1]
        asked.append(name)
        body = files[name]
        etag = hashlib.sha256(body).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Content-Length": str(len(body))}
        content = body if request.method == "GET" else b""
        return httpx.Response(200, headers=headers, content=content)

    return answer


# --- The package and directories ---


def test_the_embedded_model_lies_in_the_package():
    directory = find_model("embedded", needs_weights=False)
    assert directory == Path(fetch.__file__).parents[2] / "assets" / "tiny-gemma2"
    assert (directory / "config.json").is_file() and (directory / "tokenizer.json").is_file()


def test_a_local_directory(tmp_path, monkeypatch):
    directory = make_model(tmp_path / "models" / "mine")
    assert find_model(str(directory)) == directory
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_model("~/models/mine") == directory
    monkeypatch.chdir(tmp_path)
    assert find_model("models/mine") == Path("models/mine")  # Although it could be an id.


def test_sharded_weights(tmp_path):
    directory = make_sharded(tmp_path, shards=3)
    assert find_model(str(directory)) == directory
    (directory / "model-00002-of-00003.safetensors").unlink()
    assert message(str(directory)) == (
        f"{directory}: 1 of 3 shards are missing, such as model-00002-of-00003.safetensors; "
        "download the model again"
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("{}", "'weight_map'"),
        ("[]", "list indices must be integers or slices, not str"),
        ('{"weight_map": ["a"]}', "'list' object has no attribute 'values'"),
    ],
)
def test_an_index_that_is_none(tmp_path, content, reason):
    index = make_sharded(tmp_path, shards=2) / INDEX
    index.write_text(content)
    assert message(tmp_path, check_files) == (
        f"{index}: not a readable index of shards ({reason}); download it again"
    )


@pytest.mark.parametrize(
    ("names", "fault"),
    [
        (
            ("adapter_model.safetensors",),
            "no config.json in it; pass the directory of a whole model",
        ),
        (
            ("config.json", "tokenizer.json"),
            "no *.safetensors file in it; pass a whole model with them",
        ),
        (
            ("config.json", "tokenizer.json", "pytorch_model.bin"),
            "only PyTorch .bin weights; convert to safetensors",
        ),
        (
            ("config.json", "model.safetensors"),
            "no tokenizer.json in it; copy the model's there",
        ),
    ],
)
def test_directories_that_hold_no_model(tmp_path, names, fault):
    assert message(str(make_model(tmp_path, *names))) == f"{tmp_path}: {fault}"


def test_a_model_that_is_to_be_trained_from_random_weights(tmp_path):
    directory = make_model(tmp_path, "config.json", "tokenizer.json")
    assert find_model(str(directory), needs_weights=False) == directory


def test_names_that_are_neither(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "weights", "model.safetensors")
    for name in ("", "gemma", "./mine", "/a/b", "google/gemma/2b", "weights/model.safetensors"):
        assert message(name) == (
            f"model {name!r}: no such directory; use embedded, a directory of safetensors, a "
            "Hugging Face id such as google/gemma-2-2b-it, or "
            "kaggle:OWNER/MODEL/FRAMEWORK/VARIATION"
        )
    assert message("~nobody-of-that-name/x") == (
        "model '~nobody-of-that-name/x': cannot be read (Could not determine home directory.)"
    )
    assert message("x" * 300).endswith(
        f": cannot be read ([Errno {errno.ENAMETOOLONG}] File name too long: '{'x' * 300}')"
    )


# --- Kaggle ---


@pytest.mark.parametrize("place", ["", "m/google", "models/google"])
def test_the_newest_attached_version_wins(tmp_path, place):
    variation = tmp_path / "input" / place / "gemma-2" / "transformers" / "gemma-2-2b-it"
    older, newest = make_model(variation / "9"), make_model(variation / "10")
    make_model(variation / "latest")
    assert find_model(ON_KAGGLE) == newest
    assert find_model(FLAGSHIP) == newest
    assert find_model(f"{ON_KAGGLE}/9") == older
    assert find_model("kaggle:google/gemma-2/Transformers/gemma-2-2b-it") == newest


def test_of_two_owners_the_right_one_is_found(tmp_path):
    path = Path("gemma-2/transformers/gemma-2-2b-it/1")
    make_model(tmp_path / "input" / path)
    mine = make_model(tmp_path / "input" / "m" / "me" / path)
    assert find_model("kaggle:me/gemma-2/transformers/gemma-2-2b-it") == mine


def test_only_the_very_variation_stands_for_a_hugging_face_id(tmp_path):
    make_model(tmp_path / "input" / "gemma-2" / "transformers" / "gemma-2-2b" / "1")
    assert message(FLAGSHIP) == NO_TOKEN


def test_what_is_not_attached_is_downloaded(tmp_path, monkeypatch):
    directory = make_model(tmp_path / "downloaded")
    wanted = {f"{ON_KAGGLE.removeprefix('kaggle:')}/7": str(directory)}
    monkeypatch.setattr(kagglehub, "model_download", wanted.__getitem__)
    make_model(tmp_path / "input" / "gemma-2" / "transformers" / "gemma-2-2b-it" / "6")
    assert find_model(f"{ON_KAGGLE}/7") == directory


def test_the_cache_of_kagglehub(tmp_path, monkeypatch):
    monkeypatch.setattr(kagglehub, "model_download", MODEL_DOWNLOAD)
    monkeypatch.setattr(requests.Session, "send", raising(AssertionError("the network is used")))
    variation = tmp_path / "kagglehub/models/google/gemma-2/transformers/gemma-2-2b-it"
    cached = make_model(variation / "2")
    make_model(variation, "2.complete")  # Its mark of a whole download.
    assert find_model(f"{ON_KAGGLE}/2") == cached


@pytest.mark.parametrize("handle", ["", "gemma-2", "google/gemma-2/transformers", "a/b/c/d/new"])
def test_handles_that_are_none(handle):
    assert message(f"kaggle:{handle}") == (
        f"model 'kaggle:{handle}': not a Kaggle handle; write kaggle:OWNER/MODEL/FRAMEWORK/"
        "VARIATION, such as kaggle:google/gemma-2/transformers/gemma-2-2b-it"
    )


def kaggle_refusal(status: int) -> KaggleApiHTTPError:
    response = requests.Response()
    response.status_code = status
    return KaggleApiHTTPError(f"{status} Client Error.\n\nMore on it.", response)


SIGNED = "HTTPSConnectionPool(host='storage'): url: /model?X-Goog-Signature=0a1b (Caused by reset)"


@pytest.mark.parametrize(
    ("error", "explained"),
    [
        (
            kaggle_refusal(403),
            "Kaggle refuses it (403); attach it to the notebook, or accept its licence at "
            "kaggle.com/models/google/gemma-2 and export KAGGLE_API_TOKEN from kaggle.com/settings",
        ),
        (
            kaggle_refusal(404),
            "no such model on Kaggle; check the framework and the variation at "
            "kaggle.com/models/google/gemma-2",
        ),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
            "no space left on the disk; free some, or set KAGGLEHUB_CACHE to a larger disk",
        ),
        (
            requests.ConnectionError(SIGNED),
            "cannot be fetched (HTTPSConnectionPool(host='storage'): url: /model?... (Caused by "
            "reset)); attach it to the notebook, check the network, or pass a local directory as "
            "model",
        ),
        (
            DataCorruptionError(),
            "cannot be fetched (DataCorruptionError); attach it to the notebook, check the "
            "network, or pass a local directory as model",
        ),
    ],
)
def test_kaggle_models_that_cannot_be_fetched(monkeypatch, error, explained):
    monkeypatch.setattr(kagglehub, "model_download", raising(error))
    assert message(ON_KAGGLE) == f"model {ON_KAGGLE}: {explained}"


# --- Hugging Face ---


def offline(home: Path, name: str) -> subprocess.CompletedProcess[str]:
    """Looks for a model in a process of its own, where the library reads its environment."""
    script = (
        "import sys; from gemma2_grpo.errors import UserError\n"
        "from gemma2_grpo.model.hub.find import find_model\n"
        "try: print(find_model(sys.argv[1]))\n"
        "except UserError as error: print(error)"
    )
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script, name]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True)


def test_the_cache_serves_without_a_network_or_a_token(tmp_path):
    snapshot = cache_model(tmp_path / "hf", FLAGSHIP)
    assert offline(tmp_path / "hf", FLAGSHIP).stdout == f"{snapshot}\n"
    (snapshot / "model.safetensors").unlink()
    assert offline(tmp_path / "hf", FLAGSHIP).stdout == f"{OFFLINE}\n"
    assert offline(tmp_path / "empty", FLAGSHIP).stdout == f"{OFFLINE}\n"


def test_the_cache_serves_without_a_token_on_line(tmp_path, hub):
    hub(raising(AssertionError("the network is used")))
    snapshot = cache_model(tmp_path / "home", FLAGSHIP)
    assert find_model(FLAGSHIP) == snapshot


def test_a_missing_token_is_found_before_the_network_is_asked(tmp_path, hub):
    hub(raising(AssertionError("the network is used")))
    assert message(FLAGSHIP) == NO_TOKEN
    (cache_model(tmp_path / "home", FLAGSHIP) / "model.safetensors").unlink()
    assert message(FLAGSHIP) == NO_TOKEN


def test_only_what_is_needed_is_downloaded(hub):
    needed = (
        "config.json",
        "generation_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "additional_chat_templates/tool_use.jinja",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "model.safetensors",
    )
    asked: list[str] = []
    files = dict.fromkeys((*needed, "README.md", "pytorch_model.bin", "model.gguf"), b"{}")
    hub(serving(files, asked))
    directory = find_model("someone/tiny")
    found = [path for path in directory.rglob("*") if path.is_file()]
    assert set(asked) == set(needed) == {str(path.relative_to(directory)) for path in found}


@pytest.mark.parametrize("others", [(), ("config.json",), ("config.json", "tokenizer.json")])
def test_a_gguf_file_names_what_converts_it(tmp_path, others):
    for name in ("model-q4.gguf", *others):
        (tmp_path / name).write_text("{}")
    expected = (
        f"{tmp_path}/model-q4.gguf: is a GGUF file; convert it to safetensors with transformers: "
        f"AutoModelForCausalLM.from_pretrained('{tmp_path}', gguf_file='model-q4.gguf')"
        ".save_pretrained(DIR), the tokenizer likewise, and pass DIR"
    )
    assert message(str(tmp_path)) == expected
    assert message(str(tmp_path / "model-q4.gguf")) == expected


def test_a_repository_of_pytorch_weights_only(tmp_path, hub):
    files = dict.fromkeys(("config.json", "tokenizer.json", "pytorch_model.bin"), b"{}")
    hub(serving(files, []))
    snapshot = tmp_path / "home" / "hub" / "models--someone--tiny" / "snapshots" / COMMIT
    assert message("someone/tiny") == (
        f"{snapshot}: no *.safetensors file in it; pass a whole model with them"
    )


@pytest.mark.parametrize(
    "answer",
    [
        refusal(403, "GatedRepo", "Access to model google/gemma-2-2b-it is restricted."),
        refusal(401, "GatedRepo", "Access to model google/gemma-2-2b-it is restricted."),
        refusal(403, "", "Please enable access to public gated repositories."),
    ],
)
def test_a_token_without_the_accepted_licence(monkeypatch, hub, answer):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub(answer)
    assert message(FLAGSHIP) == NO_ACCESS


def test_the_licence_is_asked_for_at_the_files_too(monkeypatch):
    # The description of a gated repository is public; its files are not.
    request = httpx.Request("HEAD", f"https://huggingface.co/{FLAGSHIP}/resolve/main/config.json")
    error = GatedRepoError("403 Client Error.", response=httpx.Response(403, request=request))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", raising(error))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert message(FLAGSHIP) == NO_ACCESS


def test_a_gated_repository_of_someone_else_without_a_token(hub):
    hub(refusal(401, "GatedRepo"))
    assert message("someone/tiny") == NO_TOKEN.replace(FLAGSHIP, "someone/tiny")


def test_a_token_that_is_refused(monkeypatch, hub):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub(refusal(401, "", "Invalid credentials in Authorization header"))
    assert message(FLAGSHIP) == (
        f"model {FLAGSHIP}: Hugging Face refuses this HF_TOKEN; make a new token at "
        "huggingface.co/settings/tokens and export HF_TOKEN"
    )


def test_a_repository_that_does_not_exist(hub):
    for name, answer in {
        "someone/tinny": refusal(404, "RepoNotFound"),
        "someone/private": refusal(401),
        "some--one/tiny": raising(AssertionError("the network is used")),
    }.items():
        hub(answer)
        assert message(name) == (
            f"model {name}: no such directory and no such repository on Hugging Face; check the "
            "spelling, or HF_TOKEN if it is private"
        )


ADVICE = (
    "check the network and run again, which resumes the download, or pass a local directory as "
    "model"
)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (httpx.ConnectError("Name or service not known"), "Name or service not known"),
        (httpx.ConnectTimeout("timed out"), "timed out"),
        (httpx.ProxyError("403 Forbidden"), "403 Forbidden"),
    ],
)
def test_no_network(monkeypatch, hub, error, reason):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub(raising(error))
    assert message(FLAGSHIP) == f"model {FLAGSHIP}: cannot be fetched ({reason}); {ADVICE}"


def test_a_hub_that_is_down(monkeypatch, hub):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub(refusal(503))
    assert message(FLAGSHIP) == (
        f"model {FLAGSHIP}: cannot be fetched (Server error '503 Service Unavailable' for url "
        f"'https://huggingface.co/api/models/{FLAGSHIP}/revision/main'); {ADVICE}"
    )


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (f"Illegal header value b'Bearer {TOKEN} x\\x00'", "Illegal header value b'...'"),
        (f"hf_hub_download failed with {TOKEN}", "hf_hub_download failed with ..."),
        ("502 for url 'https://cdn/file?Signature=0a'", "502 for url 'https://cdn/file?...'"),
    ],
)
def test_secrets_in_messages_of_a_library_are_not_shown(monkeypatch, said, shown):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    error = httpx.LocalProtocolError(said)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", raising(error))
    assert message(FLAGSHIP) == f"model {FLAGSHIP}: cannot be fetched ({shown}); {ADVICE}"


@pytest.mark.parametrize(
    ("error", "explained"),
    [
        (httpx.ReadError("connection reset"), f"cannot be fetched (connection reset); {ADVICE}"),
        (httpx.ReadTimeout(""), f"cannot be fetched (ReadTimeout); {ADVICE}"),
        (
            OSError("Consistency check failed: file should be of size 9.\nPlease retry."),
            f"cannot be fetched (Consistency check failed: file should be of size 9.); {ADVICE}",
        ),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
            "no space left on the disk; free some, or set HF_HOME to a larger disk",
        ),
        (
            RuntimeError("Data processing error: No space left on device (os error 28)"),
            "no space left on the disk; free some, or set HF_HOME to a larger disk",
        ),
    ],
)
def test_a_download_that_breaks_off(monkeypatch, error, explained):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", raising(error))
    assert message(FLAGSHIP) == f"model {FLAGSHIP}: {explained}"


def test_nothing_expensive_is_imported_before_it_is_needed(tmp_path):
    heavy = {"huggingface_hub", "kagglehub", "jax", "tunix", "safetensors"}
    script = (
        "import sys; from gemma2_grpo.model.hub.find import find_model; find_model(sys.argv[1]); "
        f"print({heavy} & set(sys.modules))"
    )
    command = [sys.executable, "-c", script, str(make_model(tmp_path))]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"
