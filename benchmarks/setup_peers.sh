#!/usr/bin/env bash
# Sets up the systems that hasten is measured against, and the models they run, in one folder ($PEERS, default .peers/).
#
# Knows nothing of hasten: benchmarks/cpu.py makes hasten's own folders. Every step leaves a stamp, so a rerun continues
# after a failure. Takes about half an hour on two cores and 12 GB of disk; set JOBS to build llama.cpp with more cores.
#
#   benchmarks/setup_peers.sh                 everything
#   benchmarks/setup_peers.sh llama_cpp ...   only some of: models transformers llama_cpp openvino onnxruntime
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PEERS=$(realpath -m "${PEERS:-$here/../.peers}")
PYTHON=${PYTHON:-python3}
JOBS=${JOBS:-1}
export PEERS HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

# The versions the published tables were measured with. torch comes first in each environment and is pinned: a newer one
# resolved by a dependency would replace the CPU build by one with gigabytes of GPU libraries.
torch="torch==2.13.0"
transformers=(transformers==5.23.0 accelerate==1.15.0 sentencepiece==0.2.3)  # the last for llama.cpp's converter
llama_cpp=(llama-cpp-python==0.3.36)
llama_cpp_tools=(cmake==4.4.4 ninja==1.13.2 scikit-build-core pathspec pyproject-metadata numpy typing-extensions diskcache jinja2)
openvino=(openvino==2026.4.1 openvino-genai==2026.4.1.0 openvino-tokenizers==2026.4.1.0 nncf==3.4.0
  optimum-intel==2.2.0 transformers==5.5.4)
onnxruntime=(onnxruntime==1.32.0 onnxruntime-genai==0.18.0 onnx==1.23.2 onnx-ir==1.1.0 transformers)
models=(llama-15m qwen3-0.6b)

mkdir -p "$PEERS"/{venvs,logs,stamps,models,gguf,openvino,onnxruntime,src}

# step NAME COMMAND...: run once, output to a log, stop with the log's end when it fails.
step() {
  local name=$1
  shift
  [[ -e $PEERS/stamps/$name ]] && return 0
  echo "$(date +%H:%M:%S) $name"
  # In the background, because "set -e" is off inside anything that "if" tests.
  "$@" >"$PEERS/logs/$name.log" 2>&1 &
  if ! wait $!; then
    echo "failed: $name, see $PEERS/logs/$name.log; its last lines:" >&2
    tail -n 5 "$PEERS/logs/$name.log" >&2
    return 1
  fi
  touch "$PEERS/stamps/$name"
}

# environment NAME PACKAGE...: a fresh virtual environment, torch first.
environment() {
  local name=$1
  shift
  "$PYTHON" -m venv --clear "$PEERS/venvs/$name"
  local pip=("$PEERS/venvs/$name/bin/pip" install --quiet --disable-pip-version-check)
  "${pip[@]}" "$torch"
  "${pip[@]}" "$torch" "$@"
}

set_up_transformers() {
  step transformers-install environment transformers "${transformers[@]}"
}

set_up_models() {
  set_up_transformers
  step models "$PEERS/venvs/transformers/bin/python" "$here/peers/make_models.py" "$PEERS/models" "${models[@]}"
}

llama_cpp_environment() {
  "$PYTHON" -m venv --clear "$PEERS/venvs/llama_cpp"
  "$PEERS/venvs/llama_cpp/bin/pip" install --quiet --disable-pip-version-check "${llama_cpp_tools[@]}"
}

# llama.cpp as vendored by llama-cpp-python's source archive, compiled for this very processor.
llama_cpp_source() {
  cd "$PEERS/src"
  "$PEERS/venvs/llama_cpp/bin/pip" download --quiet --no-deps --no-build-isolation --no-binary :all: \
    --disable-pip-version-check "${llama_cpp[@]}"
  rm -rf llama_cpp_python
  mkdir llama_cpp_python
  tar -xzf llama_cpp_python-*.tar.gz --strip-components=1 -C llama_cpp_python
}

llama_cpp_build() {
  local bin=$PEERS/venvs/llama_cpp/bin
  "$bin/cmake" -S "$PEERS/src/llama_cpp_python/vendor/llama.cpp" -B "$PEERS/build-llama_cpp" -G Ninja \
    -DCMAKE_MAKE_PROGRAM="$bin/ninja" -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=ON \
    -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF
  "$bin/ninja" -C "$PEERS/build-llama_cpp" -j "$JOBS" llama llama-quantize
}

to_gguf() {
  local model=$1 source=$PEERS/src/llama_cpp_python/vendor/llama.cpp bf16=$PEERS/gguf/$1-BF16.gguf format
  PYTHONPATH=$source/gguf-py:$source "$PEERS/venvs/transformers/bin/python" "$here/peers/convert_gguf.py" \
    "$PEERS/models/$model" --outtype bf16 --outfile "$bf16"
  for format in Q8_0 Q4_0; do
    LD_LIBRARY_PATH=$PEERS/build-llama_cpp/bin "$PEERS/build-llama_cpp/bin/llama-quantize" \
      "$bf16" "$PEERS/gguf/$model-$format.gguf" "$format" "$JOBS"
  done
}

set_up_llama_cpp() {
  set_up_models
  step llama_cpp-install llama_cpp_environment
  step llama_cpp-source llama_cpp_source
  step llama_cpp-build llama_cpp_build
  for model in "${models[@]}"; do step "llama_cpp-$model" to_gguf "$model"; done
}

# Group 32 because 288 columns divide by it; every layer and the head at 4 bit, as hasten's int4 recipe does.
to_openvino() {
  local model=$1 width=$2 flags=()
  [[ $width == int4 ]] && flags=(--sym --group-size 32 --ratio 1.0 --all-layers)
  "$PEERS/venvs/openvino/bin/optimum-cli" export openvino -m "$PEERS/models/$model" --task text-generation-with-past \
    --weight-format "$width" "${flags[@]}" "$PEERS/openvino/$model-$width"
}

# torchvision, which optimum-intel asks for, comes for a GPU build of torch and then breaks every import of transformers.
openvino_environment() {
  environment openvino "${openvino[@]}"
  "$PEERS/venvs/openvino/bin/pip" uninstall --quiet --yes torchvision
}

set_up_openvino() {
  set_up_models
  step openvino-install openvino_environment
  for model in "${models[@]}"; do
    for width in int8 int4; do step "openvino-$model-$width" to_openvino "$model" "$width"; done
  done
}

to_onnxruntime() {
  "$PEERS/venvs/onnxruntime/bin/python" -m onnxruntime_genai.models.builder -i "$PEERS/models/$1" \
    -o "$PEERS/onnxruntime/$1-int4" -p int4 -e cpu -c "$PEERS/onnxruntime/cache"
}

set_up_onnxruntime() {
  set_up_models
  step onnxruntime-install environment onnxruntime "${onnxruntime[@]}"
  for model in "${models[@]}"; do step "onnxruntime-$model" to_onnxruntime "$model"; done
}

for part in "${@:-models}" ; do
  declare -F "set_up_$part" >/dev/null || { echo "unknown part '$part': models transformers llama_cpp openvino onnxruntime" >&2; exit 2; }
done
if (($# == 0)); then set -- llama_cpp openvino onnxruntime; fi
for part in "$@"; do "set_up_$part"; done
echo "ready in $PEERS"
