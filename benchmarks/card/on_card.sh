#!/bin/bash
# Run on a machine with a card (made for an NVIDIA H100, CUDA 13, Python 3.12, no network) in the root of a copy of the checkout with
# .gpu/ in it: see prepare.sh. Results go to $OUT. Each step has its own limit; a failing one is noted and the next one runs.
#   BUDGET_S=400 bash .gpu/on_card.sh     all of it within so many seconds: what has no time left is skipped
#   ONLY='doctor|bench-.*'                these steps alone, for a second run
#   SMALL=1                               tiny models and emulated kernels: a rehearsal on the tests' simulated card, whose builds
#                                         of Jittor lie in MOSS_JT_TEST_GPU_HOME
#   UNIFIED=1                             managed memory, too: asking for more of it than the card has free can hang a card
OUT=${OUT:-/tmp/out}; WORK=${WORK:-/tmp/moss}; BUDGET_S=${BUDGET_S:-540}; JOBS=${JOBS:-16}; PARALLEL=${PARALLEL:-1}
PY=${PY:-python3}; HERE=$PWD; KIT=$HERE/benchmarks/card; CARRIED=${CARRIED:-$HERE/.gpu}; ONLY=${ONLY:-.*}; SITE=$WORK/site; MODELS=$WORK/models; BUILD_S=${BUILD_S:-270}
fake=""; small=""; [ "${SMALL:-0}" = 1 ] && { fake=--fake; small=--small; }
mkdir -p "$OUT" "$SITE" "$MODELS" "$WORK/home"
LOG=$OUT/log.txt; : > "$LOG"
export PY PYTHONUNBUFFERED=1 PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 PATH=$PATH:/usr/local/cuda/bin
# Two builds of Jittor side by side need two homes: in one, each start waits for the other.
[ -n "$small" ] || export HOME=$WORK/home MOSS_JT_TEST_GPU_HOME=$WORK/home-gpu
export GPU_HOME=${MOSS_JT_TEST_GPU_HOME:-$HOME}
mkdir -p "$GPU_HOME"
export PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$SITE:$HERE
table=(); failed=0
left() { echo $((BUDGET_S - SECONDS)); }
note() {  # note VERDICT NAME SECONDS TEXT
    [[ $1 = PASS || $1 = SKIP ]] || failed=1
    table+=("$(printf '%-5s %-26s %4s s  %s' "$1" "$2" "$3" "$4")")
    echo "== $1 $2 ($3 s) $4  [$(left) s left]"
}
complaint() { grep -aE 'Error|error|FAILED|not found|terminate|what\(\)' "$1" | tail -1 | cut -c1-150; }
step() {  # step NAME LIMIT NEEDS COMMAND: skipped where fewer than NEEDS seconds are left
    local name=$1 limit=$2 needs=$3 command=$4 begin=$SECONDS rc
    [[ $name =~ ^($ONLY)$ ]] || return 9
    [ "$needs" -lt 1 ] && needs=1  # no time at all is no limit, for timeout
    [ "$(left)" -lt "$needs" ] && { note SKIP "$name" 0 "only $(left) s left"; return 9; }
    [ -n "$small" ] && limit=$((limit * 20))  # an emulated card is slow, and no step's limit is tried by it
    [ "$limit" -gt "$(left)" ] && limit=$(left)
    echo "==== $name: $command" >> "$LOG"
    timeout -k 5 "$limit" bash -c "$command" > "$WORK/step.log" 2>&1; rc=$?
    cat "$WORK/step.log" >> "$LOG"
    tail -n "${SHOW:-12}" "$WORK/step.log" | cut -c1-220
    case $rc in
        0) note PASS "$name" $((SECONDS - begin)) "" ;;
        124 | 137) note TIME "$name" $((SECONDS - begin)) "stopped at $limit s" ;;
        *) note FAIL "$name" $((SECONDS - begin)) "rc $rc: $(complaint "$WORK/step.log")" ;;
    esac
    return $rc
}

# 1. What there is
cat > "$WORK/facts.sh" <<'F'
nvidia-smi | head -15; nvidia-smi --query-gpu=name,driver_version,memory.total,memory.used,clocks.max.sm,clocks.max.mem --format=csv,noheader
uname -r; nproc; free -g | head -2; df -h /tmp /dev/shm | tail -2; g++ --version | head -1; command -v nvcc compute-sanitizer ncu
$PY -V; command -v "$PY"; ls -l /usr/local | grep -i cuda; nvcc --version | tail -2
ldconfig -p | grep -E 'libcuda\.so|libnvidia-ml|libcudart|libcublas|libcurand|libnvrtc|libgomp'
$PY -m pip list 2>/dev/null | grep -iE '^(nvidia|cuda|cupy|numpy|torch |transformers|tokenizers|safetensors|huggingface|click|tqdm|sympy|pytest |pillow)'
lscpu | grep -E 'Model name|avx512_vnni|amx' | cut -c1-120; nvidia-smi topo -m | head -4; nvidia-smi -q | grep -iE 'pcie|link width|generation' -A2 | head -14
true
F
SHOW=60 step facts 40 0 "bash '$WORK/facts.sh'"

# 2. The packages, and moss-jt in the checkout's layout
cat > "$WORK/unpack.sh" <<F
set -e
$PY -c "import tarfile; tarfile.open('$CARRIED/site.tar.xz').extractall('$SITE')"
[ -f $SITE/jittor_utils/__init__.py ] && sed -i 's/pool_size = min(16,max(int(mem_gib \/\/ 3), 1))/pool_size = $JOBS/' $SITE/jittor_utils/__init__.py
# The code folders are moss_jt's subpackages: installed so here, or else linked.
for name in kernels convert demos; do $PY -P -c "import moss_jt.\$name" 2>/dev/null || ln -s ../\$name moss_jt/\$name; done
ls $SITE
F
step unpack 90 0 "bash '$WORK/unpack.sh'"
if ! command -v "$($PY -c 'import sys; print("python%d.%d-config" % sys.version_info[:2])')" > /dev/null; then
    cat > "$WORK/python-config" <<F
#!/bin/sh
case "\$1" in
--includes) echo "-I$($PY -c 'import sysconfig; print(sysconfig.get_path("include"))')" ;;
--extension-suffix) echo "$($PY -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')" ;;
esac
F
    chmod +x "$WORK/python-config"
    export python_config_path=$WORK/python-config
fi
[ -n "$small" ] || export use_mkl=0  # oneDNN's wheels are not carried

# 3. What moss-jt finds: card, toolkit, CuPy
SHOW=30 step doctor 60 0 "$PY -P -m moss_jt doctor --gpu; $PY -P -c 'from moss_jt.backend.gpu_requirements import require_gpu; from moss_jt.backend.toolkit import composed
card, toolkit = require_gpu(); print(card); print(composed(toolkit)); print(*toolkit.to_load(), sep=chr(10))'"

# 4. Our kernels alone, without Jittor
SHOW=70 step kernels-check 100 30 "$PY -P '$KIT/kernels.py' check $fake"

# 5. Jittor, for the card and for the processor, side by side; meanwhile the kernels are timed
build() {  # build DEVICE
    local begin=$SECONDS
    local home=$HOME; [ "$1" = gpu ] && home=$GPU_HOME
    HOME=$home MOSS_JT_DEVICE=$1 nice -n 10 timeout -k 5 "$BUILD_S" $PY -P -c "
import time; begin = time.time()
import moss_jt.backend.jittor as backend
print('built and imported in', round(time.time() - begin), 's:', backend.jt.compiler.cache_path)" > "$WORK/build-$1.log" 2>&1
    echo "$? $((SECONDS - begin))" > "$WORK/build-$1.rc"
}
[ -n "$small" ] && BUILD_S=$((BUILD_S * 20))  # as the other limits: two cores in use by others build for long
[ "$BUILD_S" -gt "$(left)" ] && BUILD_S=$(left)
if ! [[ jittor =~ ^($ONLY)$ ]]; then :
elif [ "$(left)" -gt 20 ]; then
    build gpu & gpu=$!
    [ "$PARALLEL" = 1 ] || wait $gpu
    build cpu & cpu=$!
    [ -n "$small" ] || SHOW=60 step kernels-time 150 60 "$PY -P '$KIT/kernels.py' time '$OUT/kernels.json'"
    wait $gpu $cpu
    for device in gpu cpu; do
        read -r rc seconds < "$WORK/build-$device.rc"
        { echo "==== build $device"; cat "$WORK/build-$device.log"; } >> "$LOG"
        tail -2 "$WORK/build-$device.log" | cut -c1-250
        if [ "$rc" = 0 ]; then note PASS "jittor-$device" "$seconds" ""
        else note FAIL "jittor-$device" "$seconds" "rc $rc: $(tail -1 "$WORK/build-$device.log" | cut -c1-140)"; fi
    done
    tail -c 60000 "$GPU_HOME/.cache/jittor/moss-jt-build.log" 2>/dev/null | tr '\r' '\n' | grep -avE '^Compiling' | tail -150 > "$OUT/jittor-build.txt"
else
    note SKIP jittor 0 "only $(left) s left"
fi

# 6. The tests
tests() {  # that all were skipped is no success
    echo "$PY -P -m pytest tests/test_gpu_card.py -m gpu -k '$1' -p no:cacheprovider -q --tb=short -W ignore && grep -q ' passed' '$WORK/step.log'"
}
SHOW=25 step tests-stream 170 40 "$(tests stream)"
SHOW=25 step tests-quantised 120 40 "$(tests quantised)"
SHOW=25 step tests-training 150 60 "$(tests learns)"
[ "${UNIFIED:-0}" = 1 ] && SHOW=25 step tests-unified 90 40 "$(tests unified)"

# 7. moss-jt's own benchmark: four blocks of MOSS's width, then all of it
shm=$(df -k --output=avail /dev/shm 2>/dev/null | tail -1); [ -z "$small" ] && [ "${shm:-0}" -gt 50000000 ] && MODELS=/dev/shm/moss
mkdir -p "$MODELS"
model() { echo "$PY -P '$KIT/model.py' '$MODELS/$1' $2 $3 $small"; }
bench() { echo "set -o pipefail; HOME=$GPU_HOME $PY -P -m moss_jt bench '$MODELS/$1' --gpu $2 | tee -a '$OUT/bench.txt'"; }
contexts=32,1024; tokens=16; [ -n "$small" ] && { contexts=8; tokens=2; }
for bits in 16 4 8; do
    step write-4-blocks-$bits 60 50 "$(model four-$bits 4 $bits)" &&
        SHOW=12 step bench-4-blocks-$bits 60 40 "$(bench four-$bits "--contexts $contexts --new-tokens $tokens --repeats 2")"
done
[ -n "$small" ] || SHOW=12 step bench-4-blocks-stream 60 50 "$(bench four-16 "--contexts 32 --new-tokens 8 --repeats 1 --gpu-memory 4GiB")"
rm -rf "$MODELS"/four-*
if [ -z "$small" ]; then
    for bits in 4 16; do
        step write-moss-$bits 100 $((bits * 5 + 80)) "$(model moss-$bits 34 $bits)" &&
            SHOW=12 step bench-moss-$bits 90 60 "$(bench moss-$bits "--contexts $contexts --new-tokens $tokens --repeats 1")"
        rm -rf "$MODELS/moss-$bits"
    done
fi

# 8. Where time is left: counters of the kernels, then memcheck, then Jittor's swapping, which is another build
metrics=gpu__time_duration.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed
metrics+=,l1tex__data_pipe_lsu_wavefronts.avg.pct_of_peak_sustained_elapsed,l1tex__throughput.avg.pct_of_peak_sustained_elapsed
metrics+=,sm__throughput.avg.pct_of_peak_sustained_elapsed,sm__warps_active.avg.pct_of_peak_sustained_active
SHOW=30 step counters 60 70 "ncu --clock-control none -c 24 --metrics $metrics $PY -P '$KIT/kernels.py' once"
SHOW=10 step memcheck 90 100 "compute-sanitizer --tool memcheck --error-exitcode 3 $PY -P '$KIT/kernels.py' check --small"
[ -n "$small" ] || SHOW=25 step tests-swap 200 190 "$(tests swap)"

{ echo; echo "RESULT after $SECONDS s"; printf '%s\n' "${table[@]}"; } | tee "$OUT/table.txt"
exit $failed
