# SPDX-License-Identifier: Apache-2.0
"""`pyvseg COMMAND ...`: each command is one module of this package with an options dataclass and a function, imported only when it is called."""

import difflib
import importlib
import sys

from pyvseg.errors import PyvsegError

COMMANDS = {
    "run": "follow objects through a video, a folder of images or a DAVIS/YouTube-VOS folder",
    "batch": "segment many videos; whatever stops it, the same command goes on",
    "demo": "follow objects through a real clip that comes with the installation",
    "view": "write a page over results that opens in a browser: thumbnails, overlays, filters",
    "eval": "score results against annotations (J&F, AP, VPQ, STQ, mIoU)",
    "verify": "check that this installation reproduces the published numbers",
    "train": "train a model",
    "convert": "turn a published checkpoint into a safetensors file",
    "models": "list the models",
    "info": "versions, instruction set and backends of this installation",
}

EXAMPLE = """examples:
  pyvseg demo
  pyvseg run video.mp4 --mask first_frame.png --out results
  pyvseg COMMAND --help"""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command. Exit status: 0 done, 2 bad input, 130 Ctrl-C, else what the command says."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0 if arguments else 2
    name, rest = arguments[0], arguments[1:]
    try:
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            raise PyvsegError(f"no command {name!r}; {f'did you mean {near[0]}?' if near else 'there are ' + ', '.join(COMMANDS)}")
        return _call(name, rest) or 0
    except PyvsegError as error:
        print(f"pyvseg: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"pyvseg: {interrupt or 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `pyvseg ... | head`
        sys.stderr.close()
        return 1


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(["usage: pyvseg COMMAND ...", "", "Fast open engine for video segmentation.", "", "commands:", *lines, "", EXAMPLE])


def _call(name: str, arguments: list[str]) -> int | None:
    import tyro

    module = importlib.import_module(f"pyvseg.cli.{name}")
    options = getattr(module, name.capitalize())
    arguments = getattr(module, "completed", list)(arguments)
    return getattr(module, name)(tyro.cli(options, prog=f"pyvseg {name}", args=arguments, config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)))


if __name__ == "__main__":
    sys.exit(main())
