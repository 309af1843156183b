"""Whether Hugging Face and Kaggle answer: asked within seconds, before anything is fetched."""

import logging
import os
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeVar

T = TypeVar("T")

# A service that is there answers in less than one. Resolving a name has no time limit of its own.
_SECONDS = 2.0
_SECONDS_VARIABLE = "HF_HUB_ETAG_TIMEOUT"
# With these variables, kagglehub asks the host of the notebook, and that may take its time.
_OWN_HOSTS = ("KAGGLE_DATA_PROXY_URL", "TBE_RUNTIME_ADDR")
_KAGGLE = "https://api.kaggle.com"
_FULL_DISK = ("No space left", "quota exceeded")


def ask_hub(repository: str, file: str, kind: Literal["model", "dataset"]) -> None:
    """Asks Hugging Face, or the mirror in HF_ENDPOINT, for the head of a file, as a download does.

    Raises:
        ConnectionError: if there is no answer, naming the host.
        Exception: what `huggingface_hub` raises, for want of a token or of access perhaps.
    """
    import httpx
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    seconds = _seconds()
    url = hf_hub_url(repository, file, repo_type=kind, endpoint=constants.ENDPOINT)
    try:
        with quiet():
            within(seconds, lambda: get_hf_file_metadata(url, timeout=seconds))
    except (httpx.TimeoutException, TimeoutError):
        raise ConnectionError(f"{_hub_host()}: {_no_answer(seconds)}") from None
    except httpx.TransportError as error:
        raise ConnectionError(f"{_hub_host()}: {str(error) or type(error).__name__}") from None


def _hub_host() -> str:
    """The host used for Hugging Face, and the proxy on the way to it, if there is one."""
    from urllib.parse import urlsplit
    from urllib.request import getproxies, proxy_bypass

    from huggingface_hub import constants

    address = urlsplit(constants.ENDPOINT)
    host = address.hostname or constants.ENDPOINT
    proxy = urlsplit(getproxies().get(address.scheme, "")).hostname
    return f"{host} by the proxy {proxy}" if proxy and not proxy_bypass(host) else host


def check_kaggle() -> None:
    """Refuses to wait for Kaggle where nothing answers; its library has no limit of its own.

    Raises:
        TimeoutError: if there is no answer. All other failures are left to the library, which
            meets them at once.
    """
    if is_hosted():
        return
    import requests

    def ask() -> None:
        try:
            requests.head(_KAGGLE, timeout=_seconds())
        except requests.Timeout:
            raise
        except requests.RequestException:
            return

    try:
        within(_seconds(), ask)
    except requests.Timeout:
        raise TimeoutError(_no_answer(_seconds())) from None


def is_hosted() -> bool:
    """Whether Kaggle's or Colab's own service hands out what is on Kaggle."""
    return any(name in os.environ for name in _OWN_HOSTS)


def cached_by_kagglehub(place: str, versions: str = "", version: str | None = None) -> Path | None:
    """The newest version in kagglehub's cache that was downloaded whole, or the one asked for.

    Args:
        place: Path of the model or data set in the cache.
        versions: Folder of its versions in that place.
        version: A number; None for any.
    """
    from kagglehub.config import get_cache_folder

    folder = Path(get_cache_folder()) / place
    marks = [mark for mark in folder.glob(f"{version or '*'}.complete") if mark.stem.isdecimal()]
    newest = max(marks, key=lambda mark: int(mark.stem), default=None)
    found = folder / versions / newest.stem if newest else None
    return found if found and found.is_dir() else None


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps the libraries' warnings and retries to themselves; what fails is said in one line."""
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "kagglehub", "urllib3")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def within(seconds: float, call: Callable[[], T]) -> T:
    """Returns what a function returns or raises, unless that takes too long.

    Raises:
        TimeoutError: after so many seconds; the function still runs, in an abandoned thread.
    """
    answer: Future[T] = Future()

    def ask() -> None:
        try:
            answer.set_result(call())
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        return answer.result(seconds)
    except TimeoutError:
        if answer.done():  # The function's own.
            raise
        raise TimeoutError(_no_answer(seconds)) from None


def http_status(error: BaseException) -> int | None:
    """The HTTP status behind an error of either library, if there is one."""
    responses = (getattr(cause, "response", None) for cause in causes(error))
    return next((response.status_code for response in responses if response is not None), None)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and what it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__


def disk_is_full(error: BaseException) -> bool:
    """Whether a download failed for want of room."""
    return any(words in str(cause) for cause in causes(error) for words in _FULL_DISK)


def _seconds() -> float:
    """Timeout of a request in seconds; set the variable if the network is slow."""
    text = os.environ.get(_SECONDS_VARIABLE, "")
    return float(text) if re.fullmatch(r"\d+", text) else _SECONDS


def _no_answer(seconds: float) -> str:
    return f"no answer within {seconds:g} s, and {_SECONDS_VARIABLE}=10 waits longer"
