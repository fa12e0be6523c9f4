"""Hold one backend's test report against what is expected of it: tests ran, and nothing was skipped beyond the list.

``python .ci/check_report.py <backend> <junit file>`` prints the counts, with the skips by reason, and fails where no
test ran or where a skip is not in ``.ci/expected_skips.txt``. Each line there allows a backend at most so many skips
whose reason begins like this:

    <backend> <count> <reason>
"""

import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

EXPECTED = Path(__file__).with_name("expected_skips.txt")


def expected_skips(backend: str) -> list[tuple[int, str]]:
    lines = (line.split("#")[0].split(maxsplit=2) for line in EXPECTED.read_text().splitlines())
    return [(int(line[1]), line[2].strip()) for line in lines if line and line[0] == backend]


def main() -> int:
    backend, report = sys.argv[1], Path(sys.argv[2])
    cases = list(ElementTree.parse(report).iter("testcase"))
    skips = Counter(skip.get("message", "") for case in cases for skip in case.iter("skipped"))
    ran = len(cases) - skips.total()
    print(f"{backend}: {ran} tests ran, {skips.total()} skipped")
    complaints = [] if ran else [f"no test ran for {backend}"]
    allowed = expected_skips(backend)
    for reason, count in skips.most_common():
        print(f"  {count} skipped: {reason}")
        limit = sum(most for most, start in allowed if reason.startswith(start))
        if count > limit:
            complaints.append(f"{count} skips for this reason, {limit} expected by {EXPECTED.name}: {reason}")
    for complaint in complaints:
        print(f"{backend}: {complaint}", file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
