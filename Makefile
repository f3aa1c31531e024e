# Two commands: `make demo` shows the main job, `make test` passes the tests. Both
# install what is missing.
GO ?= go
BIN := bin/varve
VERSION ?= 0.1.0-dev
# For the tests that drive the binary, such as TESTFLAGS='-v -run Lazy'.
TESTFLAGS ?=

export GO

.PHONY: build demo test lint bench bench-table clean
# Static and stripped: a daemon that lives for weeks maps no more than it needs.
build:
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags "-s -w -X github.com/varvefs/varve/metrics.Version=$(VERSION)" -o $(BIN) ./cmd/varve

demo:
	./scripts/deps demo
	$(MAKE) build
	$(BIN) demo

test:
	./scripts/deps test
	$(MAKE) build
	./scripts/test $(TESTFLAGS)

lint:
	./scripts/lint

# Measures everything beside its rivals; REGISTRY holds the corpus' images.
bench: build
	$(GO) run ./bench/run -registry $(REGISTRY) $(BENCHFLAGS)

# The same of what is held against the rivals only, such as
# BENCHFLAGS='-n 3 -images debian,python'; bench/RESULTS.md begins with its table.
bench-table: build
	$(GO) run ./bench/run -registry $(REGISTRY) $(BENCHFLAGS) table

clean:
	rm -rf bin
