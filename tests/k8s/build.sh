#!/bin/bash
# Builds what tests/k8s needs into TOOLS (~/.cache/headgate-tools): kwok with its stages, and kubecp, one binary with etcd, API server, controllers,
# scheduler and kubelet. Half an hour, once, on two cores; what is there is left alone. Needs Go 1.26 and kubectl.
set -euo pipefail
cd "$(dirname "$0")/kubecp"
TOOLS=${TOOLS:-$HOME/.cache/headgate-tools}
mkdir -p "$TOOLS"
export GOBIN=$TOOLS CGO_ENABLED=0 GOFLAGS=-trimpath
[ -x "$TOOLS/kwok" ] || go install -ldflags '-s -w' sigs.k8s.io/kwok/cmd/kwok@v0.8.0
if ! [ -s "$TOOLS/kwok.yaml" ]; then
  # How simulated nodes and pods live; it travels in kwok's module.
  kwok=$(go mod download -json sigs.k8s.io/kwok@v0.8.0 | python3 -c 'import json, sys; print(json.load(sys.stdin)["Dir"])')
  kubectl kustomize "$kwok/kustomize/stage/fast" >"$TOOLS/kwok.yaml"
fi
version=k8s.io/component-base/version # the API server says it, and Helm compares it with the chart's kubeVersion
"$TOOLS/kubecp" kubelet --version >/dev/null 2>&1 || go build -o "$TOOLS/kubecp" \
  -ldflags "-s -w -X $version.gitVersion=v1.37.2 -X $version.gitMajor=1 -X $version.gitMinor=37 -X $version.gitTreeState=clean" .
