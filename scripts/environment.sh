# Sourced by demo.sh and test.sh: `make_environment FOLDER EXTRA` makes a virtual environment with torch, then with the
# package and one of its extras under constraints.txt, and puts it first on PATH. It does nothing where that was done.

say() { printf '\n== %s\n' "$*"; }

find_python() {
    local candidate
    for candidate in ${HF_MUON_PYTHON:-} python3 python3.13 python3.12 python3.11 python; do
        # Run it: a version manager's stub exists for every version and fails for those that are not active.
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2])' >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    echo "Python 3.11 or newer is needed (transformers 5.23 and TRL 1.16 ask for it): install it, or name it in" \
        "HF_MUON_PYTHON" >&2
    return 1
}

has_nvidia_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; }

# torch comes first and alone: its build decides about gigabytes of CUDA libraries, and what follows keeps it.
install_torch() {
    local wanted offered
    wanted="$(grep -E '^torch==' constraints.txt)"
    # Whatever build is there stays, if the version is right.
    if python -c 'import sys, torch; sys.exit("torch==" + torch.__version__.split("+")[0] != sys.argv[1])' "$wanted" \
        2>/dev/null; then
        return
    fi
    if has_nvidia_gpu || [ "$(uname -s)" != Linux ]; then
        python -m pip install "$wanted"
        return
    fi
    offered="$(python -m pip install --dry-run --no-deps --ignore-installed "$wanted" 2>/dev/null | tail -n 1)"
    if [[ "$offered" == *+cpu* ]]; then
        python -m pip install "$wanted"
    elif [ -n "${HF_MUON_TORCH_INDEX:-}" ]; then
        python -m pip install --index-url "$HF_MUON_TORCH_INDEX" "$wanted"
    else
        # It runs on a CPU all the same; only the download is larger than it need be.
        echo "No GPU here, and pip's index offers torch with CUDA (gigabytes). To fetch the CPU build instead, stop now," \
            "set HF_MUON_TORCH_INDEX to PyTorch's package index for CPU, and start again." >&2
        python -m pip install "$wanted"
    fi
}

make_environment() {
    local folder="$1" extra="$2" python stamp
    if [ ! -x "$folder/bin/python" ]; then
        python="$(find_python)"
        say "environment: $("$python" --version) in $folder"
        if ! "$python" -m venv "$folder"; then
            rm -rf "$folder"
            echo "$python cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv" >&2
            return 1
        fi
    fi
    VIRTUAL_ENV="$(cd "$folder" && pwd)"
    export VIRTUAL_ENV PATH="$VIRTUAL_ENV/bin:$PATH" PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
    # Of the checkout's path too: an editable install of another checkout must not be taken for this one.
    stamp="$(cat setup.cfg pyproject.toml constraints.txt <(pwd) | cksum) $extra"
    if [ -f "$VIRTUAL_ENV/.hf_muon" ] && grep -qxF "$stamp" "$VIRTUAL_ENV/.hf_muon"; then
        return
    fi
    say "installing torch"
    install_torch
    say "installing the package with [$extra]"
    python -m pip install --constraint constraints.txt --editable ".[$extra]"
    echo "$stamp" >>"$VIRTUAL_ENV/.hf_muon"
}
