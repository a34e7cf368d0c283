"""`trl-learnalign export`: export the prompts that a run selected as a dataset with a card, optionally to the hub."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from trl_learnalign.cli.console import exit_with

DESCRIPTION = """Write the selected prompts of a run as a dataset: data/train.parquet with all columns of the
training dataset and the selection's measurements of each prompt, and README.md, a card about the selection.
Only the run's records are needed. datasets.load_dataset(FOLDER) loads it."""


def parser() -> argparse.ArgumentParser:
    """The argument parser."""
    made = argparse.ArgumentParser("trl-learnalign export", description=DESCRIPTION)
    made.add_argument("run", help="output folder of a training run, or of trl-learnalign select")
    made.add_argument(
        "folder", type=Path, help="folder to write to; empty, or of an earlier export"
    )
    made.add_argument(
        "--stage",
        type=int,
        metavar="K",
        help="number of the stage (default: the last one with a selection)",
    )
    made.add_argument(
        "--selector", help="for a run of select: the selector of the subset (default: the only one)"
    )
    made.add_argument(
        "--top",
        type=int,
        metavar="N",
        help="for a run of select: the size of the subset (default: the largest)",
    )
    made.add_argument("--push_to_hub", metavar="USER/NAME", help="dataset repository to push it to")
    made.add_argument("--private", action="store_true", help="make that repository private")
    return made


def main(arguments: Sequence[str]) -> None:
    """Run the command."""
    given = parser().parse_args(arguments)
    with exit_with("trl-learnalign export"):
        count = export(given)
        print(f"{count:,} prompts: {given.folder} (datasets.load_dataset)")
        if given.push_to_hub is not None:
            address = push(given.folder, given.push_to_hub, given.private)
            print(f"Pushed: {address}")


def export(given: argparse.Namespace) -> int:
    """Write the dataset.

    Args:
        given (`argparse.Namespace`): The command line.

    Returns:
        `int`: Number of written prompts.
    """
    from trl_learnalign.records.export import (
        card_of,
        stage_selection,
        subset_selection,
        write_selection,
    )
    from trl_learnalign.report import read_run

    run = read_run(given.run)
    contents = run.contents
    if contents.subsets:
        if given.stage is not None:
            raise ValueError(
                f"--stage {given.stage}: {given.run} is a run of select, which has no stages."
            )
        selection = subset_selection(run.output_dir, contents, given.selector, given.top)
    else:
        if given.selector is not None or given.top is not None:
            raise ValueError(
                f"--selector and --top apply to runs of select, but {given.run} has stages."
            )
        stage = None if given.stage is None else f"stage_{given.stage}"
        selection = stage_selection(run.folder, contents, stage)
    write_selection(given.folder, selection, card_of(contents, selection))
    return len(selection.table)


def push(folder: Path, name: str, private: bool) -> str:
    """Push a dataset to the hub; returns its URL.

    Args:
        folder (`Path`): As written by [`export`].
        name (`str`): `USER/NAME`.
        private (`bool`): Whether a new repository is private; an existing one is not changed.

    Raises:
        `RuntimeError`: If the hub cannot be reached or refuses; the message names the local folder.
    """
    from huggingface_hub import HfApi

    from trl_learnalign.records.export import FILES

    api = HfApi()
    try:
        repository = api.create_repo(
            name, repo_type="dataset", private=private or None, exist_ok=True
        )
        api.upload_folder(
            repo_id=repository.repo_id,
            folder_path=folder,
            repo_type="dataset",
            allow_patterns=list(FILES),
            commit_message="Prompts selected with trl_learnalign",
        )
    except Exception as error:  # from any of the libraries that access the hub
        raise RuntimeError(
            f"pushing to {name} failed ({error}). The dataset is in {folder}; log in (`hf auth login`) and run the "
            "same command again."
        ) from error
    return str(repository)
