#!/usr/bin/env bash
# The main machine of a training on two: bash run_node0.sh [main.py flags]. What stands in the environment goes before
# the settings below; all other settings are in multinode_train.sh.

export MAIN_NODE_IP=${MAIN_NODE_IP:-192.168.1.100}  # address of this machine, the same on both
export GPUS=${GPUS:-2,3}  # this machine's GPUs; 0 and 1 stay free
export TOTAL_GPUS=${TOTAL_GPUS:-4}  # of both machines together, the same on both

exec bash "$(dirname -- "${BASH_SOURCE[0]}")/multinode_train.sh" 0 "$@"  # rank 0: the other machine connects to it
