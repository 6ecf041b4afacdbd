"""The command line: ``python -m fasttrain.train CONFIG.toml [section.key=value …]``.

Only the config is loaded until it is known to be good; torch comes after.
"""

import argparse
import contextlib
import glob
import json
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from fasttrain.command import EXIT_FAILED, EXIT_STOPPED, check_system, command, make_parser
from fasttrain.config import TrainConfig, UserError, load_config
from fasttrain.config.load import config_file, help_text, nearest_keys, shipped_configs
from fasttrain.config.trust import refuse_foreign_keys
from fasttrain.distributed.launch import adopt
from fasttrain.printing import say


def _parser() -> argparse.ArgumentParser:
    plain = argparse.RawDescriptionHelpFormatter
    what = "Train a language model from a TOML config."
    parser = make_parser("train", what, epilog=help_text(), formatter_class=plain)
    add = parser.add_argument
    configs = ", ".join(shipped_configs())
    add("config", nargs="?", help=f"TOML file, or the name of a shipped one: {configs}")
    add("overrides", nargs="*", metavar="section.key=value", help="values that override the file's")
    add(
        "--resume",
        metavar="auto|PATH",
        help="continue a run. auto: the newest unfinished run of this config, or a new run if "
        "there is none. PATH: a run or checkpoint folder, or the address of a run in a mirror; its "
        "own config is used unless you name one. A checkpoint that is not its run's "
        "newest, or another run.name, starts a branch: a new run, in a folder of its own",
    )
    decay = "start a branch from a run or checkpoint folder, with its config unless one is given, "
    decay += "and decay its learning rate (with schedule.name=wsd) from there to its end"
    add("--decay-from", metavar="PATH", help=decay)
    over = "with --resume CHECKPOINT: start no branch, but continue in the folder of its run and "
    add("--overwrite", action="store_true", help=over + "drop the newer checkpoints and log lines")
    stop = "stop after step N with a checkpoint and exit status 75"
    add("--stop-at-step", type=int, metavar="N", help=stop)
    change = "a key that may differ from the resumed run's; repeatable"
    add("--allow-change", action="append", default=[], metavar="section.key", help=change)
    look = "only report what the run needs and what may harm it, as fasttrain.preflight does"
    trust = "accept every key of a resumed run's own config, including those that can run other "
    trust += "people's code or reach other folders: eval.tasks_path, data.cache_dir, "
    trust += "checkpoint.mirror"
    add("--trust", action="store_true", help=trust)
    add("--dry-run", action="store_true", help=look)
    prove = "only prove that resuming works: N steps in one process and in two must give "
    add("--verify-resume", type=int, metavar="N", help=prove + "identical bits")
    return parser


def _config_held_by(
    resumed: Path, option: str, overrides: Sequence[str]
) -> tuple[TrainConfig, str]:
    """Return the config that a run or checkpoint folder holds, and a name for a branch of the run.

    The run's name and place are taken from the folder, since it may have been moved, unless
    ``overrides`` set them.
    """
    from fasttrain.run.folder import run_dir_above
    from fasttrain.run.record import config_name, read_record

    run_dir = run_dir_above(resumed, option)
    held = [folder / "config.toml" for folder in (resumed, run_dir)]
    path = next(filter(Path.is_file, held), None)
    if path is None:
        raise UserError(f"{option} {resumed}: {held[-1]} is missing; name a config as well")
    config = load_config(path, overrides)
    given = {override.partition("=")[0].strip() for override in overrides}
    name = run_dir.resolve().name
    settings = config.run
    if "run.name" not in given and settings.name is not None:
        settings = replace(settings, name=name)
    if "run.out_dir" not in given:
        settings = replace(settings, out_dir=str(run_dir.parent))
    if settings.name is None and (record := read_record(run_dir)):
        stem = config_name(record)
        if re.fullmatch(rf"{re.escape(stem)}(-\d+)?", name):
            name = stem
    return replace(config, run=settings), name


def _refuse_branch_of_address(address: str, run_name: str, overrides: Sequence[str]) -> None:
    """Refuse another ``run.name`` for a run in a mirror: a branch starts from a folder here."""
    names = [o.partition("=")[2].strip().strip("\"'") for o in overrides if _sets_name(o)]
    if names and names[-1] != run_name:
        raise UserError(
            f"--resume {address}: continues the run {run_name}, not run.name = {names[-1]}; for a "
            "branch, bring it here first: repeat the command without run.name, stop it, and name "
            "its folder with --resume"
        )


def _sets_name(override: str) -> bool:
    return override.partition("=")[0].strip() == "run.name"


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status.

    0: done, or verified; 1: failed, or not verified; 2: bad input; 75: stopped, and can be resumed;
    128 + n: ended by signal n before there was anything to resume.
    """
    adopt()
    parser = _parser()
    arguments, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        flag = unknown[0].lstrip("-").partition("=")[0].replace("-", "_")
        key = (nearest_keys(flag) or ["optim.lr"])[0]
        parser.error(f"unknown: {' '.join(unknown)}; config keys have no dashes: {key}=VALUE")
    given: str | None = arguments.config
    if given is not None and re.match(r"[\w.]+ *=", given) and not Path(given).exists():
        arguments.overrides.insert(0, given)  # the first of several, and no config
        given = None
    source: str | None = arguments.decay_from
    if arguments.resume not in (None, "auto"):
        source = arguments.resume
    if given is None and source is None:
        parser.error("name a config, such as base or configs/base.toml")
    if arguments.overwrite and arguments.resume in (None, "auto"):
        parser.error("--overwrite needs --resume CHECKPOINT: it continues in that run's own folder")

    of_others = given is None  # the run's own config, which may come from anybody
    only_looks = arguments.dry_run or arguments.verify_resume is not None
    was_saved = arguments.resume not in (None, "auto") and not only_looks

    def interrupted(number: int) -> int:
        what = "resume as before" if was_saved else "nothing to resume"
        say(f"interrupted before the first step; {what}", stream=sys.stderr)
        return EXIT_STOPPED if was_saved else 128 + number  # as a shell reports it

    try:
        check_system()
        from fasttrain.run.signals import interruptible

        # Exit at once instead of raising: a C extension that is being imported could swallow the
        # exception and be left half initialized.
        with (
            interruptible(lambda number, _: os._exit(interrupted(number))),
            contextlib.ExitStack() as fetched,
        ):
            if "://" in (address := arguments.resume or ""):
                from fasttrain.mirror import config_at

                mirror, _, run_name = address.rstrip("/").rpartition("/")
                keys = {"checkpoint.mirror": mirror, "run.name": run_name}
                _refuse_branch_of_address(address, run_name, arguments.overrides)
                arguments.overrides += [f"{k}={json.dumps(v)}" for k, v in keys.items()]
                path = Path(given or fetched.enter_context(config_at(address)))
                config, name = load_config(path, arguments.overrides), run_name
                config_path = path if given else None
                arguments.resume = "auto"
            elif given is None:
                option = "--decay-from" if source == arguments.decay_from else "--resume"
                held = Path(source or "")
                config, name = _config_held_by(held, option, arguments.overrides)
                config_path = None
            else:
                config = load_config(given, arguments.overrides)
                name, config_path = Path(given).stem, config_file(given)
            if of_others and not arguments.trust:
                origin = source or address
                refuse_foreign_keys(config, arguments.overrides, origin, at_address="://" in origin)
            if arguments.resume == "auto" and not only_looks:
                runs = f"{glob.escape(config.run.name or name)}*"
                was_saved = any(Path(config.run.out_dir).glob(f"{runs}/checkpoints/step-*"))
            if not only_looks:
                from fasttrain.run.run import run
        if arguments.dry_run:
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of the profiler
            from fasttrain.preflight.plan import preflight

            return 0 if preflight(config) else EXIT_FAILED
        if arguments.verify_resume is not None:
            from fasttrain.verify_resume import verify_resume

            return verify_resume(config, arguments.verify_resume)
        return run(
            config,
            name=name,
            resume=arguments.resume,
            stop_at_step=arguments.stop_at_step,
            allow_change=arguments.allow_change,
            decay_from=arguments.decay_from,
            config_path=config_path,
            overwrite=arguments.overwrite,
        )
    except KeyboardInterrupt as error:
        return interrupted(error.args[0] if error.args else signal.SIGINT)
    except Exception as error:  # `command` says and records it
        rank, found = os.environ.get("RANK"), re.search("gloo|NCCL", str(error))
        if rank and found and not isinstance(error, UserError):
            error.add_note(
                f"rank {rank}: another rank has ended or is out of reach; its error, above or in "
                "torchrun's summary, says why"
            )
            time.sleep(1.1)  # torchrun names the rank that failed first, in whole seconds
        raise


def leave(status: int) -> NoReturn:
    """End the process. A failed rank exits at once: destroying its process groups would block."""
    if status == EXIT_FAILED and "RANK" in os.environ:
        from fasttrain.run.signals import end_at_once

        sys.stdout.flush()
        sys.stderr.flush()
        end_at_once(status)
    sys.exit(status)


if __name__ == "__main__":
    leave(main())
