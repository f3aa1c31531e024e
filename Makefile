# Two commands: `make demo` shows the main job, `make test` passes the tests. Both
# install what is missing.
GO ?= go
BIN := bin/varve
VERSION ?= 0.1.0-dev
# For the tests that drive the binary, such as TESTFLAGS='-v -run Lazy'.
TESTFLAGS ?=

export GO

.PHONY: build demo test lint clean
build:
	$(GO) build -trimpath -ldflags "-X github.com/varvefs/varve/metrics.Version=$(VERSION)" -o $(BIN) ./cmd/varve

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

clean:
	rm -rf bin
