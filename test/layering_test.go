package test

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/varvefs/varve/"

// arrows are the edges of the table in docs/ARCHITECTURE.md: which of our
// packages each may import. A package that is not here may not exist. A name
// that ends in /... stands for all below it.
//
// Two rules are not in the table. index/jtoc lies below the readers of formats
// whose table of contents is JSON, index/indextest below their tests. And what
// measures and shows (bench and all below it, test) stands above everything; cmd/varve takes its demo from there.
var arrows = map[string][]string{
	"cmd/varve":         {"daemon", "snapshotter", "run", "run/monitor", "install", "containerd", "bench/demo", "bench/link"},
	"daemon":            {"fs", "fs/upper", "index", "index/...", "fetch", "fetch/store", "fetch/profile", "commit", "image", "metrics", "run", "run/monitor"},
	"run":               {},
	"run/monitor":       {"run"},
	"snapshotter":       {"daemon", "image"},
	"fs":                {"index", "fs/upper", "fetch/store", "metrics"},
	"fs/upper":          {},
	"index":             {},
	"index/jtoc":        {"index"},
	"index/indextest":   {"index"},
	"index/estargz":     {"index", "index/jtoc"},
	"index/zstdchunked": {"index", "index/jtoc"},
	"index/soci":        {"index"},
	"index/tarscan":     {"index", "index/inflate", "index/zstdblocks"},
	"index/inflate":     {"index"},
	"index/zstdblocks":  {"index"},
	"fetch":             {"index", "index/...", "fetch/store", "fetch/profile", "metrics"},
	"fetch/store":       {"metrics"},
	"fetch/profile":     {},
	"commit":            {"index", "fs/upper", "image"},
	"image":             {},
	"metrics":           {},
	"install":           {},
	"containerd":        {"image"},
	"bench":             {"..."},
	"bench/...":         {"..."},
	"test":              {"..."},
	"test/...":          {"..."},
}

// foreign says which of our packages may import what is not ours.
var foreign = map[string][]string{
	"github.com/hanwen/go-fuse/":                              {"fs", "daemon", "test", "test/..."},
	"github.com/google/go-containerregistry/":                 {"fetch", "commit", "image", "bench", "bench/...", "test", "test/..."},
	"github.com/containerd/stargz-snapshotter/":               {"index/estargz", "index/zstdchunked", "commit", "bench", "bench/...", "test", "test/..."},
	"github.com/containerd/containerd/":                       {"snapshotter", "install", "containerd", "run", "test", "test/..."},
	"github.com/prometheus/client_golang/prometheus/promhttp": {"daemon"},
	"github.com/spf13/cobra":                                  {"cmd/varve", "bench/..."},
	"github.com/moby/buildkit/":                               {"commit"},
	"github.com/moby/patternmatcher":                          {"commit"},
	"github.com/moby/go-archive":                              {"test", "test/..."},
}

func TestLayering(t *testing.T) {
	cmd := exec.Command("go", "list", "-json=ImportPath,Imports,TestImports,XTestImports", "./...")
	cmd.Dir = ".."
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v: %s", err, stderrOf(err))
	}
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p struct {
			ImportPath                         string
			Imports, TestImports, XTestImports []string
		}
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		from := strings.TrimPrefix(p.ImportPath, module)
		allowed, known := may(from)
		if !known {
			t.Errorf("package %s has no line in the table of arrows", from)
			continue
		}
		for _, to := range p.Imports {
			if ours, ok := strings.CutPrefix(to, module); ok && !covers(allowed, ours) {
				t.Errorf("%s imports %s: no arrow goes there", from, ours)
			}
			for prefix, users := range foreign {
				if strings.HasPrefix(to+"/", strings.TrimSuffix(prefix, "/")+"/") && !covers(users, from) {
					t.Errorf("%s imports %s, which only %s may", from, to, strings.Join(users, ", "))
				}
			}
		}
		// A package's own tests may write what it reads, and a reader's compare it
		// with other readers, but they never know what stands above it.
		beside := []string{"bench/forms", "bench/link", "index/indextest"}
		if strings.HasPrefix(from, "index/") {
			beside = append(beside, "index/...")
		}
		for _, to := range slices.Concat(p.TestImports, p.XTestImports) {
			ours, ok := strings.CutPrefix(to, module)
			if ok && ours != from && !covers(allowed, ours) && !covers(beside, ours) {
				t.Errorf("the tests of %s import %s: no arrow goes there", from, ours)
			}
		}
	}
}

func may(from string) (allowed []string, known bool) {
	if allowed, known = arrows[from]; known {
		return allowed, true
	}
	for pattern, allowed := range arrows {
		if covers([]string{pattern}, from) {
			return allowed, true
		}
	}
	return nil, false
}

// covers reports whether a package is one of those named.
func covers(patterns []string, pkg string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool {
		below, wild := strings.CutSuffix(p, "...")
		return p == pkg || wild && strings.HasPrefix(pkg, below)
	})
}
