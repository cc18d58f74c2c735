# SPDX-License-Identifier: Apache-2.0
"""One rank under a launcher: runs the task files of a folder, one after the other, for ever."""

from __future__ import annotations

import gc
import os
import pickle
import sys
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from tests.harness.launched import POLL_SECONDS, _write_whole

TIMEOUT = timedelta(seconds=240)


def serve(folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    # pytest's own filter does not reach other processes.
    warnings.filterwarnings("error", module=r"flora_dist\.")
    dist.init_process_group("gloo", timeout=TIMEOUT)
    rank, count = dist.get_rank(), 0
    while True:
        count += 1
        task = folder / f"task-{count}"
        while not task.exists():
            if not folder.exists():  # whoever started this is gone
                os._exit(0)
            time.sleep(POLL_SECONDS)
        try:
            torch.manual_seed(0)
            body, args = pickle.loads(task.read_bytes())
            result = body(*args)
            dist.barrier()
        except BaseException:
            text = traceback.format_exc().encode()
            _write_whole(folder / f"failed-{count}-rank-{rank}", text)
            os._exit(1)
        _write_whole(folder / f"result-{count}-{rank}", pickle.dumps(result))
        # As in ranks.py: groups of engines that are left to the collector keep threads awake.
        del result
        gc.collect()
        gc.freeze()


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
