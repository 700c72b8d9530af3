"""Jittor's own swapping, the baseline. It needs a second build of Jittor (1 to 3 minutes, once), so that the test with a
model runs only where that build exists, or with MOSS_JT_TEST_SWAP=1."""

import json
import os
import subprocess
import sys

import pytest

from moss_jt import Moss
from moss_jt.backend.build import build_folder, is_built
from moss_jt.backend.device import SWAP_SWITCH
from moss_jt.backend.threads import compute_threads
from moss_jt.store.model_folder import open_store
from moss_jt.store.sizes import MIB, sizes_of_store
from tests.support.plans import plan
from tests.support.random_models import WIDE, random_folder

# After the answer, no file may grow any more: the disk is full, as Jittor sees it.
PROGRAM = """
import json, resource, sys
from moss_jt import Moss
from moss_jt.errors import MossError
folder, memory = sys.argv[1:]
moss = Moss.load(folder, memory=int(memory), context=64, draft="off", offload="swap")
answer = moss.generate([3, 4, 5], max_new_tokens=4, temperature=0)
for piece in answer:
    pass
from moss_jt.weights.swap import swap_folder
def files():
    return len(list(swap_folder().glob(f"{os.getpid()}-*.bin")))
import os
swapped = files()
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    moss.logits([3, 4, 5])
    message = "nothing happened"
except MossError as error:
    message = str(error)
moss.close()
print(json.dumps({"token_ids": answer.token_ids, "swapped": swapped, "message": message, "left": files()}))
"""


def test_swapping_gives_the_same_answer_and_a_full_disk_is_told() -> None:
    built = build_folder().with_name("moss-jt-swap")
    if not is_built(built) and os.environ.get("MOSS_JT_TEST_SWAP") != "1":
        pytest.skip("Jittor is not built for swapping here; MOSS_JT_TEST_SWAP=1 builds it (1 to 3 minutes)")
    folder = random_folder(WIDE)
    with Moss.load(folder, memory="4GiB", context=64) as moss:
        answer = moss.generate([3, 4, 5], max_new_tokens=4, temperature=0)
        assert all(isinstance(piece, str) for piece in answer)
    sizes = sizes_of_store(open_store(folder))
    # Of 200 MB of weights 80 may be in memory; 170 MiB are the process with its libraries.
    everything = plan(sizes, 64, 1 << 40, threads=compute_threads())
    budget = everything.workspace_bytes + everything.kv_cache_bytes + 80 * 10**6 + 170 * MIB
    environment = {key: value for key, value in os.environ.items() if key not in ("cache_name", SWAP_SWITCH)}
    command = [sys.executable, "-P", "-c", PROGRAM, str(folder), str(budget)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["token_ids"] == answer.token_ids and result["swapped"] > 0
    assert "could not write or read its swap files" in result["message"]
    assert result["left"] == 0
