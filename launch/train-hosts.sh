#!/bin/bash
# One run of `meshlm train` over hosts that are reached by ssh: by hand, without a scheduler.
#
#   ./train-hosts.sh host1,host2 --run=/shared/runs/first --data=/shared/store \
#     --preset=gpt-j-6b --batch-size=64 --mesh.data=16
#
# A host is a process with all its GPUs; the first is the coordinator. Keys for ssh, MeshLM at the
# same place (MESHLM), and --run and --data on a file system that all see, are needed. Ctrl-C or
# SIGTERM stops all: they save one step. The exit code is the worst of the hosts'.
set -uo pipefail
if [ $# -lt 2 ]; then
    echo "usage: $0 HOST,HOST,... OPTION OF meshlm train..." >&2
    exit 2
fi
IFS=, read -ra hosts <<<"$1"
shift
MESHLM=${MESHLM:-meshlm} PORT=${PORT:-8476} SSH=${SSH:-ssh}
# Quoted once more, for the shell on the hosts.
printf -v arguments ' %q' "$@"

folder=$(mktemp -d) || exit 1
trap 'rm -r "$folder"' EXIT
# What the hosts read ends when this script is told to stop, or is gone: then they stop too.
mkfifo "$folder/input"
exec 9<>"$folder/input" 8<"$folder/input"
trap 'trap "" INT TERM; exec 9>&-' INT TERM  # once: to be told again changes nothing

for index in "${!hosts[@]}"; do
    command="export JAX_COORDINATOR_ADDRESS=${hosts[0]}:$PORT JAX_NUM_PROCESSES=${#hosts[@]} JAX_PROCESS_ID=$index
        exec 3<&0
        $MESHLM train$arguments </dev/null & meshlm=\$!
        { cat <&3; kill -TERM \$meshlm; } >/dev/null 2>&1 & watch=\$!
        wait \$meshlm; code=\$?
        kill \$watch 2>/dev/null; exit \$code"
    echo 137 >"$folder/code-$index"  # of one that was killed
    # What is sent to the group of processes is for this script; the hosts hear of it from there.
    { trap "" INT TERM; $SSH "${hosts[index]}" "$command" <&8; echo $? >"$folder/code-$index"; } 9>&- &
done

# A signal ends the waiting, not what is waited for.
while [ -n "$(jobs -pr)" ]; do wait; done
exit "$(sort -n "$folder"/code-* | tail -n 1)"
