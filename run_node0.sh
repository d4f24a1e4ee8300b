#!/usr/bin/env bash
# The main node of a training on two machines: bash run_node0.sh [main.py flags]. Settings: see multinode_train.sh.
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/multinode_train.sh" 0 "$@"  # machine rank 0: the others connect to it
