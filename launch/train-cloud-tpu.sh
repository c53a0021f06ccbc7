#!/bin/bash
# One run of `meshlm train` on every host of a Cloud TPU slice, from a machine with gcloud.
#
#   TPU=my-v5e-256 ZONE=us-west4-a ./train-cloud-tpu.sh --run=/shared/runs/first \
#     --data=/shared/store --preset=gpt-j-6b --batch-size=512 --mesh.data=256
#
# JAX reads the slice's own metadata: which hosts there are, and who is the first. --run and --data
# lie on a file system that all hosts see. Start it again after the slice was taken away and came
# back: it goes on from the newest checkpoint.
#
# Nobody has run this on a slice yet; a test checks its form.
set -euo pipefail
: "${TPU:?the name of the TPU slice}" "${ZONE:?its zone}"
MESHLM=${MESHLM:-meshlm}

# Quoted once more, for the shell on the hosts.
printf -v arguments ' %q' "$@"
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all \
    --command="exec $MESHLM train$arguments"
