"""The chore that puts a run's files on the Hugging Face hub, and the list of what it would send."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.core.errors import BadInput
from finetune.core.files import find_link_out
from finetune.ui.drafts import HUB_ID

NOT_SENT = ("step-*", "step-*/**", ".*", "**/.*")  # checkpoints that were exported, and hidden files
LONGEST_TOKEN = 500  # characters


def files_to_send(run: Path) -> list[tuple[str, int]]:
    """The names and sizes of what would be sent of a run's exports."""
    from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]  # in its documentation

    home = run / "exports"
    names = sorted(file.relative_to(home).as_posix() for file in home.rglob("*") if file.is_file())
    return [
        (name, (home / name).stat().st_size) for name in filter_repo_objects(names, ignore_patterns=list(NOT_SENT))
    ]


def push_of(values: Mapping[str, Any], run: Path) -> dict[str, Any]:
    """What the chore is given.

    Raises:
        BadInput: the hub id or the token can't be one, or the run has nothing to send.
    """
    repo, token = str(values.get("repo", "")).strip(), str(values.get("token", "")).strip()
    if not HUB_ID.fullmatch(repo):
        raise BadInput("write where it goes as OWNER/NAME: OWNER is your name on the hub")
    if len(token) > LONGEST_TOKEN or not token.isascii() or any(sign.isspace() for sign in token):
        raise BadInput("this is no token of the hub: copy it again from its page of tokens")
    if not (run / "exports" / "README.md").is_file():
        raise BadInput("the run has no model card yet: it is written with the files, at the end")
    if find_link_out(run / "exports") is not None:
        raise BadInput("the folder of files has a link out of it: it is not sent")
    return {"run": str(run), "repo": repo, "token": token, "private": values.get("private") is not False}


def push_run(given: Mapping[str, Any]) -> Any:
    """Makes the repository if it is not there, and sends the files of `files_to_send`. The token is used, and nothing
    keeps it.

    Raises:
        BadInput: the hub refused it or can't be reached, or nobody is logged in.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    hub, repo = HfApi(token=given["token"] or None), given["repo"]
    try:
        place = hub.create_repo(repo, private=given["private"], exist_ok=True)
        hub.upload_folder(
            repo_id=repo, folder_path=Path(given["run"]) / "exports", ignore_patterns=list(NOT_SENT),
            commit_message="A model trained with finetune",
        )  # fmt: skip
    except OfflineModeIsEnabled as error:
        raise BadInput("HF_HUB_OFFLINE switches the hub off here: start the page without it") from error
    except LocalTokenNotFoundError as error:
        raise BadInput("you are not logged in to the hub: type a token, or run `hf auth login` first") from error
    except HfHubHTTPError as error:
        raise BadInput(_refused(error.response.status_code if error.response is not None else 0, repo)) from error
    except (HTTPError, OSError) as error:  # what lies between here and the hub
        raise BadInput("the hub can't be reached: look at the connection, and try again") from error
    return {"url": str(place), "files": len(files_to_send(Path(given["run"])))}


def _refused(code: int, repo: str) -> str:
    if code == 401:
        return "the hub does not know this token or login: type a token that may write"
    if code in (403, 404):
        return f"this token or login may not write to {repo}: use one with the right to write, or another owner"
    return f"the hub did not take it (its answer was {code}): try again later"
