#!/usr/bin/env bash
# The other node of a training on two machines: bash run_node1.sh [the flags of node 0]. Settings: multinode_train.sh.
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/multinode_train.sh" 1 "$@"  # machine rank 1: connects to MAIN_NODE_IP
