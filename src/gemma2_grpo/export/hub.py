"""Uploading an export to Hugging Face: private by default, and only after asking."""

import sys
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.utils import HFValidationError, validate_repo_id

from gemma2_grpo.errors import UserError, first_line

# Files of an earlier export, which the new one may not have.
_REPLACED = [
    "*.safetensors",
    "*.safetensors.index.json",
    "adapter_config.json",
    "chat_template.jinja",
    "additional_chat_templates/*",
]


def confirm_upload(repository: str, *, public: bool, yes: bool) -> None:
    """Settles, before anything is exported, that it may be uploaded.

    Args:
        repository: OWNER/NAME on Hugging Face.
        public: Make the repository public.
        yes: Do not ask.

    Raises:
        UserError: for a name or a login that will not do, or if the answer is no.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError:
        raise UserError(f"--push {repository!r}: is no repository; write OWNER/NAME") from None
    if get_token() is None:
        raise UserError(
            "--push needs a login; export HF_TOKEN with a token that may write, from "
            "huggingface.co/settings/tokens, or run hf auth login"
        )
    if yes:
        return
    if not sys.stdin.isatty():
        raise UserError("--push asks before it uploads, and there is no terminal; add --yes")
    seen_by = "everybody can see it" if public else "private"
    answer = input(f"Upload to huggingface.co/{repository} ({seen_by}) when it is written? [y/N] ")
    if answer.strip().lower() not in ("y", "yes"):
        raise UserError("not exported; leave out --push to export without uploading")


def upload(folder: Path, repository: str, *, public: bool) -> str:
    """Uploads a directory as one commit and returns the address; earlier weights are replaced.

    Raises:
        UserError: if it was not uploaded; the directory is kept.
    """
    api = HfApi()
    try:
        url = api.create_repo(repository, private=not public, exist_ok=True)
        if not public and not api.repo_info(url.repo_id).private:
            raise UserError(
                f"{folder} is written but not uploaded: {repository} exists and is public; choose "
                "another repository, or add --public"
            )
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=folder,
            commit_message="Export of gemma2-grpo",
            delete_patterns=_REPLACED,
        )
    except UserError:
        raise
    except Exception as error:  # The hub's client and its HTTP library each have their own.
        raise UserError(
            f"{folder} is written but not uploaded: {first_line(error)}; check the network and the "
            f"token, then: hf upload {repository} {folder}"
        ) from None
    return str(url)
