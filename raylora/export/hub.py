"""Puts an exported model on the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub import HfApi

from raylora.errors import MergeError


def push(directory: Path, repository: str, private: bool) -> None:
    try:
        api = HfApi()
        api.whoami()  # says at once if nobody is logged in
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=directory)
    except Exception as error:  # beside its own errors, the Hub's client lets those of its HTTP library through
        first = str(error).strip().splitlines()[0]
        raise MergeError(f"{repository} could not be put on the Hub: {first}; `hf auth login` first") from error
