#!/bin/sh
# Checks the kernels: `sanitize` with the address and undefined behaviour sanitizers, `neon` for 64-bit Arm under qemu
# (Debian: g++-aarch64-linux-gnu qemu-user), `fuzz [COUNT]` inside Python with the same sanitizers, over 10 000 mutated
# checkpoints (PYTHON: an interpreter that has bellbit's dependencies).
set -eu
cd "$(dirname "$0")/../csrc"
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
common="-std=c++20 -O2 -g -Wall -Wextra -Wno-maybe-uninitialized -Wno-uninitialized -fno-math-errno -fno-trapping-math"

# compile COMPILER SOURCE OBJECT [FLAGS …]
compile() {
    compiler=$1 source=$2 object=$3
    shift 3
    "$compiler" $common "$@" -c "$source" -o "$out/$object.o"
}

san="-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"

case "${1:-}" in
sanitize)
    wide="-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c"
    compile g++ check.cpp check $san
    compile g++ dispatch.cpp dispatch $san -DBELLBIT_X86
    compile g++ portable.cpp portable $san
    compile g++ avx2.cpp avx2 $san -mavx2 -mfma -mf16c
    compile g++ avx512.cpp avx512 $san $wide
    compile g++ avx512.cpp avx512vnni $san $wide -mavx512vnni -DBELLBIT_VNNI
    g++ $san "$out"/*.o -o "$out/check"
    "$out/check"
    ;;
neon)
    cross=aarch64-linux-gnu-g++
    compile $cross check.cpp check
    compile $cross dispatch.cpp dispatch -DBELLBIT_ARM
    compile $cross portable.cpp portable
    compile $cross neon.cpp neon
    compile $cross neon.cpp neondot -march=armv8.2-a+dotprod -DBELLBIT_DOT
    $cross -static "$out"/*.o -o "$out/check"
    qemu-aarch64 -cpu max "$out/check"
    ;;
fuzz)
    python=${PYTHON:-python3}
    cd ..
    # not NB_STATIC's own checks: vptr needs the types of the interpreter
    "$python" -m pip install --quiet --no-deps --target "$out/site" \
        -C cmake.define.CMAKE_CXX_FLAGS="$san -fno-sanitize=vptr -g" -C cmake.define.BELLBIT_OPTIMIZE=-O1 .
    # an editable install would be found first
    echo 'import sys; sys.meta_path = [f for f in sys.meta_path if "ScikitBuild" not in type(f).__name__]' \
        > "$out/site/sitecustomize.py"
    export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)"
    export ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=2 PYTHONPATH="$out/site:tests"
    "$python" -c "import bellbit._kernels as k; assert k.__file__.startswith('$out'), k.__file__"
    "$python" tests/fuzz_loader.py "${2:-10000}" 1
    ;;
*)
    echo "usage: $0 sanitize | neon | fuzz [COUNT]" >&2
    exit 2
    ;;
esac
