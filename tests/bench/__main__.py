"""`python -m tests.bench [NAME...]`: run these benchmarks, or all."""

import subprocess
import sys

NAMES = ("cut", "refit", "score", "spans", "speed", "vision")


def main() -> int:
    names = sys.argv[1:] or NAMES
    if unknown := set(names).difference(NAMES):
        print(f"no benchmark {', '.join(sorted(unknown))}: there are {', '.join(NAMES)}", file=sys.stderr)
        return 2
    return max(subprocess.run([sys.executable, "-m", f"tests.bench.{name}"]).returncode != 0 for name in names)


sys.exit(main())
