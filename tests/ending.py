"""python ending.py FOLDER SAVE END SIGNAL SCRIPT …: runs a script whose run in FOLDER saves after SAVE steps and is sent SIGNAL
after END of them, so that a test's kill always comes at the same moment."""

import math
import os
import runpy
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import common

folder, (save, end, number), sys.argv = sys.argv[1], map(int, sys.argv[2:5]), sys.argv[5:]
after = common.Run.after_step

def after_step(run):
    if run.out == folder:
        run.look = 0 if run.step in (save, end) else math.inf
        run.due = 0 if run.step == save else math.inf
        if run.step == end and run.rank == 0:
            for _ in range(1 if run.world > 1 else 2):                                   # as from a scheduler and torchrun both
                if run.world > 1:
                    os.kill(os.getppid(), number)                                        # torchrun passes it on
                else:
                    os.killpg(0, number)                                                 # with DataLoader's workers
        if run.step == end:
            while not run.stop and number != signal.SIGKILL:
                time.sleep(0.01)
    after(run)

common.Run.after_step = after_step
runpy.run_path(sys.argv[0], run_name="__main__")
