package main

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestFioTime(t *testing.T) {
	const good = `note: something
{"jobs": [{"error": 0, "job_runtime": 251, "write": {"total_ios": 65536}}]}`
	got, err := fioTime(good)
	if err != nil || got != 251*time.Millisecond {
		t.Errorf("%v, %v", got, err)
	}
	for _, bad := range []string{
		"", "{", `{"jobs":[]}`,
		`{"jobs":[{"error":28,"job_runtime":251,"write":{"total_ios":65536}}]}`,
		`{"jobs":[{"error":0,"job_runtime":251,"write":{"total_ios":65535}}]}`,
		`{"jobs":[{"error":0,"write":{"total_ios":65536}}]}`,
	} {
		if got, err := fioTime(bad); err == nil {
			t.Errorf("%s gives %v", bad, got)
		}
	}
}

func TestTurn(t *testing.T) {
	v := []string{"a", "b", "c"}
	for i, want := range [][]string{{"a", "b", "c"}, {"b", "c", "a"}, {"c", "a", "b"}, {"a", "b", "c"}} {
		if d := cmp.Diff(want, turn(v, i)); d != "" {
			t.Errorf("turn %d (-want +got):\n%s", i, d)
		}
	}
}

func TestAtLeast(t *testing.T) {
	for got, want := range map[float64]string{0.89: "missed", 0.9: "reached", 2: "reached"} {
		if v := atLeast(got, 0.9); v != want {
			t.Errorf("%v is %s", got, v)
		}
	}
}

// The upper that is committed is the same in every run, and as large as is said.
func TestCommitTree(t *testing.T) {
	sizes := func() []int { return commitSizes(rand.New(rand.NewPCG(commitSeed, 0))) }
	first, sum := sizes(), 0
	for _, n := range first {
		if n < 0 {
			t.Fatalf("a file of %d bytes", n)
		}
		sum += n
	}
	if len(first) != commitFiles || sum != commitBytes {
		t.Errorf("%d files of %d bytes together", len(first), sum)
	}
	if d := cmp.Diff(first, sizes()); d != "" {
		t.Errorf("(-first +second):\n%s", d)
	}
	pool := make([]byte, 1<<20)
	for _, n := range []int{0, 1, 64, 65, 100_000} {
		text := func() []byte { return appendText(nil, rand.New(rand.NewPCG(1, 2)), pool, n) }
		if got := text(); len(got) != n || string(got) != string(text()) {
			t.Errorf("a text of %d bytes has %d, or is another the second time", n, len(got))
		}
	}
}
