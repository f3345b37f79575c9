"""Writes one file again and again, each time full of the next number: write_files.py FILES PATH.

FILES is ``adaptive_opt/checkpoints/files.py``, which is run alone: it needs no JAX. Goes on with
the number that is in the file. Prints each number once it is written.
"""

import pathlib
import runpy
import sys

SIZE = 2**22


def main(files: str, path: pathlib.Path) -> None:
    replace_file = runpy.run_path(files)["replace_file"]
    number = int.from_bytes(path.read_bytes()[:4], "little") if path.exists() else 0
    print(number, flush=True)
    while True:
        number += 1
        replace_file(path, number.to_bytes(4, "little") * (SIZE // 4))
        print(number, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], pathlib.Path(sys.argv[2]))
