# Needs Go, git and network for modules; `make race` a C compiler besides.
# Tools are built once, at the pinned versions, into .tools, which git ignores.

GO        ?= go
FUZZTIME  ?= 60s
BENCHTIME ?= 1s
BENCH     ?= .
PKG       ?= ./...
# Tests of clusters mostly wait, for elections and for other processes.
PARALLEL  ?= 4
# `make run ARGS="-data-dir /tmp/x"`
ARGS      ?=

# How much `make soak` does; the tests read these and have smaller defaults.
DIURNA_CRASH_POINTS ?= 20000
DIURNA_FLIPS        ?= 50000
DIURNA_KILLS        ?= 200
DIURNA_CLUSTER_KILLS ?= 100
DIURNA_JOIN_MIB      ?= 2048
DIURNA_CONSUL_OUTAGE ?= 60
DIURNA_CERT_LIFE     ?= 60
DIURNA_HISTORIES    ?= 5000
DIURNA_ROUNDS       ?= 50

GOLANGCI_LINT_VERSION      := v2.15.0
BUF_VERSION                := v1.75.0
PROTOC_GEN_GO_VERSION      := v1.36.12
PROTOC_GEN_GO_GRPC_VERSION := v1.6.2

VERSION  ?= $(shell git describe --tags --match 'v[0-9]*' --dirty 2>/dev/null || echo dev)
REVISION ?= $(shell git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)$(shell git diff --quiet HEAD 2>/dev/null || echo +dirty)
LDFLAGS  := -s -w -X main.version=$(VERSION) -X main.revision=$(REVISION)

TOOLS := $(CURDIR)/.tools
BIN   := $(TOOLS)/bin

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

.PHONY: build
build: ## Build bin/diurna, one static binary
	CGO_ENABLED=0 $(GO) build -trimpath -buildvcs=false -ldflags '$(LDFLAGS)' -o bin/diurna .

.PHONY: run
run: build ## Build, then run one development node (ARGS="-data-dir ...")
	bin/diurna agent -dev $(ARGS)

.PHONY: cluster
cluster: build ## Build, then run three nodes and a real Consul until Ctrl-C (TLS=1: with certificates)
	@scripts/cluster.sh

.PHONY: image
image: ## Build the image diurna:dev, and diurna:VERSION
	CGO_ENABLED=0 GOOS=linux $(GO) build -trimpath -buildvcs=false -ldflags '$(LDFLAGS)' -o bin/linux/diurna .
	@VERSION='$(VERSION)' REVISION='$(REVISION)' scripts/image.sh bin/linux/diurna $(sort diurna:dev diurna:$(VERSION))

.PHONY: images
images: ## Have the images of Consul and Vault: pull them, or build stand-ins
	@GO='$(GO)' scripts/images.sh

.PHONY: compose-up
compose-up: image images ## Build what is needed, then run three nodes, Consul and Vault by Compose
	@scripts/compose-up.sh

.PHONY: compose-down
compose-down: ## Stop them, and keep their data (ARGS=-v: and remove it)
	@scripts/compose.sh --profile tools --profile example down $(ARGS)

.PHONY: test
test: vet proto-check consul nomad vault ## Vet, check that generated code is fresh, run all tests
	$(GO) test -parallel $(PARALLEL) -timeout 20m $(PKG)

.PHONY: race
race: consul nomad vault ## Run all tests with the race detector (needs a C compiler)
	GORACE='suppressions=$(CURDIR)/scripts/race.txt' CGO_ENABLED=1 $(GO) test -race -parallel $(PARALLEL) -timeout 40m $(PKG)

.PHONY: soak
soak: consul nomad vault ## Run the same tests for hours: more crashes, bit flips and kills
	DIURNA_SOAK=1 DIURNA_CRASH_POINTS=$(DIURNA_CRASH_POINTS) DIURNA_FLIPS=$(DIURNA_FLIPS) DIURNA_KILLS=$(DIURNA_KILLS) \
		DIURNA_HISTORIES=$(DIURNA_HISTORIES) DIURNA_ROUNDS=$(DIURNA_ROUNDS) \
		DIURNA_CLUSTER_KILLS=$(DIURNA_CLUSTER_KILLS) DIURNA_JOIN_MIB=$(DIURNA_JOIN_MIB) DIURNA_CONSUL_OUTAGE=$(DIURNA_CONSUL_OUTAGE) DIURNA_CERT_LIFE=$(DIURNA_CERT_LIFE) \
		$(GO) test -count=1 -timeout 12h $(PKG)

.PHONY: fuzz
fuzz: ## Run every fuzz target for FUZZTIME (60s) each
	@set -e; list=$$($(GO) list $(PKG)); \
	for pkg in $$list; do \
		targets=$$($(GO) test -list '^Fuzz' $$pkg); \
		for target in $$(echo "$$targets" | grep '^Fuzz' || true); do \
			echo "==> $$target in $$pkg"; \
			$(GO) test -run '^$$' -fuzz "^$$target$$" -fuzztime $(FUZZTIME) $$pkg; \
		done; \
	done

.PHONY: bench
bench: ## Run the benchmarks (BENCH=regexp, BENCHTIME=1s)
	$(GO) test -run '^$$' -bench '$(BENCH)' -benchmem -benchtime $(BENCHTIME) $(PKG)

.PHONY: bench-cluster
bench-cluster: nats ## Compare three nodes with three of NATS JetStream (DIURNA_BENCH_ROUNDS=3, DIURNA_BENCH_JSON=file)
	DIURNA_NATS='$(BIN)' $(GO) test -run '^$$' -bench '^BenchmarkCluster$$' -benchtime 1x -timeout 60m -v ./agent

.PHONY: vet
vet:
	$(GO) vet $(PKG)

.PHONY: lint
lint: $(TOOLS)/golangci-lint-$(GOLANGCI_LINT_VERSION) $(TOOLS)/buf-$(BUF_VERSION) ## Lint the Go code and the proto
	$(BIN)/golangci-lint run $(PKG)
	cd rpc && $(BIN)/buf lint

.PHONY: proto
proto: proto-tools ## Regenerate the Go code of rpc/v1 from its proto
	cd rpc && $(BIN)/buf lint && PATH="$(BIN):$$PATH" $(BIN)/buf generate

# Generates in a copy, so that a check changes nothing.
.PHONY: proto-check
proto-check: proto-tools ## Fail if the generated code is not what its proto gives
	@set -e; tmp=$$(mktemp -d); trap 'rm -rf "$$tmp"' EXIT; \
	mkdir "$$tmp/v1"; cp rpc/buf.yaml rpc/buf.gen.yaml "$$tmp"; cp rpc/v1/*.proto "$$tmp/v1"; \
	(cd "$$tmp" && PATH="$(BIN):$$PATH" $(BIN)/buf generate); \
	for f in $$(cd rpc && ls v1/*.pb.go; cd "$$tmp" && ls v1/*.pb.go); do \
		diff -u "rpc/$$f" "$$tmp/$$f" || { echo "rpc/$$f is stale: run make proto" >&2; exit 1; }; \
	done

.PHONY: proto-tools
proto-tools: $(TOOLS)/buf-$(BUF_VERSION) $(TOOLS)/protoc-gen-go-$(PROTOC_GEN_GO_VERSION) $(TOOLS)/protoc-gen-go-grpc-$(PROTOC_GEN_GO_GRPC_VERSION)

# A tool's stamp names its version: a new pin builds the tool anew.
$(TOOLS)/golangci-lint-$(GOLANGCI_LINT_VERSION):
	$(call install,golangci-lint,github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$(GOLANGCI_LINT_VERSION))
$(TOOLS)/buf-$(BUF_VERSION):
	$(call install,buf,github.com/bufbuild/buf/cmd/buf@$(BUF_VERSION))
$(TOOLS)/protoc-gen-go-$(PROTOC_GEN_GO_VERSION):
	$(call install,protoc-gen-go,google.golang.org/protobuf/cmd/protoc-gen-go@$(PROTOC_GEN_GO_VERSION))
$(TOOLS)/protoc-gen-go-grpc-$(PROTOC_GEN_GO_GRPC_VERSION):
	$(call install,protoc-gen-go-grpc,google.golang.org/grpc/cmd/protoc-gen-go-grpc@$(PROTOC_GEN_GO_GRPC_VERSION))

# Tests run against a real Consul, Nomad and Vault. The scripts know the versions
# and build only where there is none; their stamps are like the others'.
.PHONY: consul
consul: ## Have a consul for tests: the one on the PATH, or one built into .tools
	@path=$$(GO='$(GO)' scripts/consul.sh) && echo "consul: $$path"

.PHONY: nomad
nomad: ## Have a nomad for tests: the one on the PATH, or one built into .tools
	@path=$$(GO='$(GO)' scripts/nomad.sh) && echo "nomad: $$path"

.PHONY: vault
vault: ## Have a vault for tests: the one on the PATH, or one built into .tools
	@path=$$(GO='$(GO)' scripts/vault.sh) && echo "vault: $$path"

# What bench-cluster compares with; scripts/nats names the versions.
NATS_STAMP := $(TOOLS)/nats-$(shell awk '$$1 ~ /nats-server|natscli/ { printf "%s", $$2 }' scripts/nats/go.mod)

.PHONY: nats
nats: $(NATS_STAMP)
$(NATS_STAMP):
	@echo "==> building nats-server and nats"
	@mkdir -p $(BIN)
	@cd scripts/nats && GOFLAGS= GOWORK=off CGO_ENABLED=0 $(GO) build -mod=readonly -buildvcs=false -o $(BIN)/ \
		github.com/nats-io/nats-server/v2 github.com/nats-io/natscli/nats
	@rm -f $(TOOLS)/nats-v*
	@touch $@

define install
@echo "==> building $(2)"
@GOBIN=$(BIN) $(GO) install $(2)
@rm -f $(TOOLS)/$(1)-v*
@touch $@
endef

.PHONY: clean
clean: ## Remove what was built, but not the tools
	rm -rf bin coverage.out
