# shellcheck shell=bash
# Every cache of every library below one root, for quotas on home folders and for nodes without a network:
#
#     export RACS_ALICE_CACHE=/scratch/me/cache; . scripts/slurm/caches.sh
#
# To be read (.) by job scripts, and by the shell on the login node that fetches tokenizer and data. Without
# RACS_ALICE_CACHE nothing changes. scripts/doctor.py looks at the variables that are exported here.
if [ -n "${RACS_ALICE_CACHE:-}" ]; then
    unset HF_HUB_CACHE HUGGINGFACE_HUB_CACHE HF_ASSETS_CACHE HF_DATASETS_CACHE HF_MODULES_CACHE TRANSFORMERS_CACHE
    export XDG_CACHE_HOME="$RACS_ALICE_CACHE/xdg"
    export HF_HOME="$RACS_ALICE_CACHE/huggingface"
    export TORCH_HOME="$RACS_ALICE_CACHE/torch"
    export TORCH_EXTENSIONS_DIR="$RACS_ALICE_CACHE/torch_extensions"
    export TORCHINDUCTOR_CACHE_DIR="$RACS_ALICE_CACHE/inductor"
    export TRITON_CACHE_DIR="$RACS_ALICE_CACHE/triton"
    export CUDA_CACHE_PATH="$RACS_ALICE_CACHE/cuda"
    export MPLCONFIGDIR="$RACS_ALICE_CACHE/matplotlib"
    export WANDB_DIR="$RACS_ALICE_CACHE/wandb"
    export WANDB_CACHE_DIR="$RACS_ALICE_CACHE/wandb/cache"
    export WANDB_CONFIG_DIR="$RACS_ALICE_CACHE/wandb/config"
    export WANDB_DATA_DIR="$RACS_ALICE_CACHE/wandb/data"
    mkdir -p "$RACS_ALICE_CACHE/wandb"   # wandb falls back to another place where this one is not there
fi
