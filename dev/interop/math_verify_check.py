#!/usr/bin/env python3
"""The verifier `number` beside math-verify, the grader of lm-evaluation-harness and TRL.

    pip install math-verify
    ./chat eval MODEL --tasks gsm8k=test.jsonl -o answers.jsonl
    dev/interop/math_verify_check.py answers.jsonl test.jsonl

The first file has a line {"answer": text} for each line {"answer": solution with ####} of the
second, which may be shorter: it is then asked again from its beginning. Prints how often the two
agree, on the verdict and on the number that they read, and every answer on which they do not: the
expected number, what each of them read, and the text.
"""
import json
import os
import subprocess
import sys
import tempfile

from math_verify import parse, verify

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def judged_by_cake(rows):
    """[(right, the number that was read)] of [(text, expected)]."""
    with tempfile.TemporaryDirectory() as directory:
        judge = os.path.join(directory, "judge")
        subprocess.run([os.environ.get("CXX", "g++"), "-std=c++20", "-O1", "-fopenmp", "-I" + ROOT,
                        "-o", judge, os.path.join(ROOT, "dev/interop/judge.cpp"), "-lsimdjson"],
                       check=True)
        lines = "".join(json.dumps({"text": t, "expected": e}) + "\n" for t, e in rows)
        out = subprocess.run([judge], input=lines, capture_output=True, text=True, check=True)
    return [(r["right"], r["found"]) for r in map(json.loads, out.stdout.splitlines())]


def judged_by_math_verify(rows, numbers):
    """[(right, what was read, whether that is the number that cake read)]"""
    judged = []
    for (text, expected), number in zip(rows, numbers):
        gold = expected.split("####")[-1].strip().replace(",", "")
        read = parse(text)
        same = any(verify(parse(n), read) for n in (number, number.rstrip("%"))) if number else not read
        judged.append((bool(verify(parse(gold), read)), " | ".join(map(str, read)), same))
    return judged


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    answers = [json.loads(line)["answer"] for line in open(sys.argv[1])]
    solutions = [json.loads(line)["answer"] for line in open(sys.argv[2])]
    rows = [(text, solutions[i % len(solutions)]) for i, text in enumerate(answers)]
    ours = judged_by_cake(rows)
    theirs = judged_by_math_verify(rows, [found for _, found in ours])
    differ = [i for i in range(len(rows)) if ours[i][0] != theirs[i][0]]
    for i in [i for i in range(len(rows)) if i in differ or not theirs[i][2]]:
        print(f"answer {i + 1}: expected {rows[i][1].split('####')[-1].strip()}, cake "
              f"{'right' if ours[i][0] else 'wrong'} ({ours[i][1] or 'no number'}), math-verify "
              f"{'right' if theirs[i][0] else 'wrong'} ({theirs[i][1] or 'nothing'})")
        print("    " + json.dumps(rows[i][0], ensure_ascii=False))
    both = sum(a[0] and b[0] for a, b in zip(ours, theirs))
    print(f"{len(rows)} answers: {len(rows) - len(differ)} judged alike ({both} right, "
          f"{len(rows) - len(differ) - both} wrong); cake alone says right of "
          f"{sum(ours[i][0] for i in differ)}, math-verify alone of "
          f"{sum(theirs[i][0] for i in differ)}; the same number was read in "
          f"{sum(t[2] for t in theirs)}")


if __name__ == "__main__":
    main()
