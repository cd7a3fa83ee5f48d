"""Uploads an exported model to the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub import HfApi

from raylora.errors import MergeError, first_line


def push(directory: Path, repository: str, private: bool) -> None:
    """Upload a directory to a Hub repository. Create the repository if it is missing.

    Args:
        directory: exported model.
        repository: Hub id, `owner/name`.
        private: make a new repository private.

    Raises:
        MergeError: nobody is logged in, or the Hub refuses the upload.
    """
    try:
        api = HfApi()
        api.whoami()  # fails at once if nobody is logged in
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=directory)
    except Exception as error:  # huggingface_hub passes on errors of its HTTP library
        raise MergeError(
            f"{repository} could not be uploaded to the Hub: {first_line(error)}; `hf auth login` first"
        ) from error
