"""Started once by torchrun, on two ranks: calls train_gpt2.main() for each job that appears in a directory.

A job is a file job_0.json, job_1.json, ... with the flags, the directory to work in, the step within which
rank 1 gets a SIGTERM, or null, and a port at which the ranks meet. The answer of rank 0 is job_0_rank0.txt,
what it printed.
"""

import contextlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt2


def perform(flags, cwd, stop, port):
    os.chdir(cwd)
    # Not in torchrun's store, where the names of the last job's process group are taken already.
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(port)}
    steps, training_step = [], train_gpt2.training_step

    def stopped(*args):
        steps.append(0)
        if train_gpt2.RANK == 1 and len(steps) == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return training_step(*args)

    train_gpt2.training_step = stopped
    try:
        train_gpt2.main(flags)
    finally:
        train_gpt2.training_step = training_step


def main():
    jobs, number = Path(sys.argv[1]).resolve(), 0
    while True:
        while not (jobs / f"job_{number}.json").exists():
            time.sleep(0.01)
        answer = jobs / f"job_{number}_rank{train_gpt2.RANK}.txt"
        with open(f"{answer}.part", "w") as f, contextlib.redirect_stdout(f):
            try:
                perform(**json.loads((jobs / f"job_{number}.json").read_text()))
            except BaseException:
                traceback.print_exc(file=f)
                f.flush()
                os.rename(f.name, answer)
                raise
        os.rename(f.name, answer)
        number += 1


if __name__ == "__main__":
    main()
