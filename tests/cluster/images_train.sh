# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
#
# Two containers through docker/compose.yaml: what they are, what they train together, what happens when one is
# killed. Sourced by images.sh.
: "${work:?}" "${IMAGE:?}" "${USER_ID:?}" "${DOCKER:?}" "${PYTHON:?}"

readonly -a COMPOSE=(docker-compose -f docker/compose.yaml)
readonly -a TRAIN=(-m flora_dist.trainer --config configs/tiny.yaml --set 'optimizer={name: flora, lr: 1e-2, rank: 4, block: 16}'
    --set checkpoint.every=3 --set output.progress=false --set output.tensorboard=false)
readonly FSDP2='backend={name: fsdp2, timeout_minutes: 0.5}'
readonly ZERO2='backend={name: deepspeed, timeout_minutes: 0.5, config: configs/deepspeed/zero2.json, changes: {optimizer: null, train_micro_batch_size_per_gpu: null, bf16: null, gradient_clipping: null}}'
# A job that has lost a host must have ended by then.
readonly LIMIT_S=60

node() {
    "$DOCKER" exec "flora_$1_1" "${@:2}"
}

wait_healthy() {
    local name
    for name; do
        for _ in {1..60}; do
            [[ $("$DOCKER" inspect --format '{{.State.Health.Status}}' "flora_${name}_1") == healthy ]] && continue 2
            sleep 1
        done
        "$DOCKER" logs --tail 20 "flora_${name}_1" >&2
        fail "$name must become healthy within 60 s; its last lines are above."
    done
}

start_nodes() {
    local started
    stop_engine
    start_engine own
    started=$SECONDS
    FLORA_KEYS=$work/keys FLORA_IMAGE=$IMAGE "${COMPOSE[@]}" --no-ansi up -d --no-build >"$work/compose.log" 2>&1 || {
        cat "$work/compose.log" >&2
        fail 'docker-compose up must succeed; its output is above.'
    }
    wait_healthy node1 node2
    say "two nodes up and healthy: $((SECONDS - started)) s"
}

# check_nodes: as whom they run, what a session that ssh opens has, what can be read from outside.
check_nodes() {
    local name lines
    for name in node1 node2; do
        [[ $(node "$name" id -u) == "$USER_ID" ]] || fail "$name must run as uid $USER_ID; it is $(node "$name" id -u)."
        [[ $(node "$name" hostname) == "$name" ]] || fail "$name must be called so."
        ! node "$name" sh -c 'test -w /etc/passwd || test -w /opt/flora/bin/python' || fail "$name must not write to the image's files."
        lines=$(node "$name" cat /home/flora/.deepspeed_env)
        ! grep -v -E -x '[A-Za-z_][A-Za-z0-9_]*=[A-Za-z0-9_@%+=:,./-]+' <<<"$lines" || fail "$name's .deepspeed_env has bad lines, above."
        diff <(grep -E '^(PATH|TORCH_EXTENSIONS_DIR|DS_ACCELERATOR|(GLOO|NCCL)_SOCKET_IFNAME|OMP_NUM_THREADS)=' <<<"$lines") \
            <(node "$name" env | grep -E '^(PATH|TORCH_EXTENSIONS_DIR|DS_ACCELERATOR|(GLOO|NCCL)_SOCKET_IFNAME|OMP_NUM_THREADS)=' | sort) ||
            fail "$name's .deepspeed_env must have the container's variables; the difference is above."
    done
    diff <(node node1 cat /home/flora/.deepspeed_env) <(node node1 ssh node2 env | grep -x -F -f <(node node1 cat /home/flora/.deepspeed_env) | sort) ||
        fail 'a session that ssh opens must have the variables of .deepspeed_env; the difference is above.'
    [[ $(node node1 pdsh -S -w node1,node2 hostname | sort | tr '\n' ' ') == 'node1: node1 node2: node2 ' ]] || fail 'pdsh must reach both nodes.'
    "$DOCKER" inspect flora_node1_1 flora_node2_1 >"$work/settings"
    node node1 cat /proc/1/environ /home/flora/.deepspeed_env | tr '\0' '\n' >>"$work/settings"
    "$PYTHON" tests/cluster/images_secrets.py "$work/settings" -- "$work/pip_conf" "$work/ca_bundle" "$work/keys/client_key" "$work/keys/host_key" ||
        fail "no secret may stand in a container's settings; the lines above say which."
    node node1 sed 's/^/        /' /home/flora/.deepspeed_env
    say 'nodes: not root, variables and ssh as they should be'
}

# train WHERE RUN ARGUMENT...: through a launcher's name over both nodes, or `single`, two processes of node1.
train() {
    local -a front=(flora-dist launch --launcher "$1" --hostfile hostfile --master-addr node1 "${TRAIN[@]}")
    [[ $1 != single ]] || front=(torchrun --standalone --nproc-per-node 2 "${TRAIN[@]}")
    node node1 "${front[@]}" --set "output.name=$2" "${@:3}" >"$work/$2.log" 2>&1
}

sent_by() {
    node "$1" cat /sys/class/net/eth0/statistics/tx_bytes
}

# check_run WHERE RUN BACKEND: trains, and looks whether both nodes sent gradients. Each of the 6 steps sends those of
# half of 41,696 parameters at least, 4 bytes each.
check_run() {
    local started=$SECONDS first second
    first=$(sent_by node1) second=$(sent_by node2)
    train "$1" "$2" --set "$3" || {
        tail -n 30 "$work/$2.log" >&2
        fail "$1 must train to the end; its last lines are above."
    }
    # Open MPI gives its processes a terminal, and the trainer colours what it prints there.
    sed 's/\x1b\[[0-9;]*m//g' "$work/$2.log" | grep -q '2 x cpu' || fail "$1 must train on two processes."
    first=$(($(sent_by node1) - first)) second=$(($(sent_by node2) - second))
    if [[ $1 == single ]]; then
        ((first < 100000 && second < 100000)) || fail "processes of one node must not use the network; they sent $first and $second bytes."
    else
        ((first > 500000 && second > 500000)) || fail "both nodes must send gradients; they sent $first and $second bytes."
    fi
    node node1 flora-dist convert "runs/$2/checkpoints" "runs/$2.pt" >/dev/null
    say "$1: trained in $((SECONDS - started)) s; node1 sent $first bytes, node2 $second"
}

check_training() {
    local run
    check_run single single "$FSDP2"
    check_run pdsh pdsh "$ZERO2"
    check_run torchrun torchrun "$FSDP2"
    check_run openmpi openmpi "$ZERO2"
    check_run mpirun mpirun "$FSDP2"
    node node1 flora-dist convert runs/single/checkpoints/step-00000003 runs/half.pt >/dev/null
    "$DOCKER" exec -i flora_node1_1 python - runs/single runs/half.pt runs/{pdsh,torchrun,openmpi,mpirun} <tests/cluster/images_compare.py ||
        fail 'every launcher must give the weights and losses of the run on one node; the lines above say which does not.'
}

# ours NODE: the processes that a job has there.
ours() {
    node "$1" pgrep -u "$USER_ID" -f -a 'flora_dist|deepspeed|torchrun|orted|mpirun' || true
}

# check_lost LAUNCHER BACKEND LOST: kills a node in the middle of training; the job must end and leave nothing.
check_lost() {
    local run=lost_$1_$3 started job code=0 left outcome=''
    train "$1" "$run" --set "$2" --set train.steps=100000 --set evaluation.every=100000 --set checkpoint.every=null &
    job=$!
    for _ in {1..120}; do
        [[ $(node node1 sh -c "wc -l <runs/$run/metrics.jsonl" 2>/dev/null || echo 0) -ge 3 ]] && break
        kill -0 "$job" 2>/dev/null || break
        sleep 1
    done
    [[ -n $(ours node1) && -n $(ours node2) ]] || {
        tail -n 30 "$work/$run.log" >&2
        fail "$1 must be training on both nodes before one is killed; its last lines are above."
    }
    started=$SECONDS
    "$DOCKER" kill "flora_$3_1" >/dev/null
    if [[ $3 == node2 ]]; then
        for _ in $(seq "$LIMIT_S"); do
            kill -0 "$job" 2>/dev/null || break
            sleep 1
        done
        ! kill -0 "$job" 2>/dev/null || fail "$1 must end within $LIMIT_S s after node2 is killed, and goes on."
        wait "$job" || code=$?
        ((code)) || fail "$1 must end with an error after node2 is killed; its exit code is 0."
        left=node1 outcome=", exit code $code"
    else
        # The launcher was on it.
        wait "$job" || true
        left=node2
    fi
    until [[ -z $(ours "$left") ]]; do
        ((SECONDS - started < LIMIT_S)) || fail "$1 must leave nothing on $left; there is: $(ours "$left")"
        sleep 1
    done
    say "$1, $3 killed: nothing left on $left after $((SECONDS - started)) s$outcome"
    [[ -z $outcome ]] || grep -E '^(flora-dist launch|error): ' "$work/$run.log" | cut -c 1-160 | sed 's/^/        /'
    "$DOCKER" start "flora_$3_1" >/dev/null
    wait_healthy "$3"
}

check_lost_nodes() {
    check_lost pdsh "$ZERO2" node2
    check_lost torchrun "$FSDP2" node2
    check_lost pdsh "$ZERO2" node1
    check_lost torchrun "$FSDP2" node1
}

stop_nodes() {
    FLORA_KEYS=$work/keys FLORA_IMAGE=$IMAGE "${COMPOSE[@]}" --no-ansi down -v >"$work/compose.log" 2>&1 || {
        cat "$work/compose.log" >&2
        fail 'docker-compose down must succeed; its output is above.'
    }
    [[ -z $("$DOCKER" ps -aq)$("$DOCKER" volume ls -q)$("$DOCKER" network ls -q --filter name=flora) ]] ||
        fail 'docker-compose down must leave no container, volume or network.'
    say 'nodes down: no container, volume or network left'
}
