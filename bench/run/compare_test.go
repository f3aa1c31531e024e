package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestJudge(t *testing.T) {
	for _, c := range []struct {
		unit     string
		old, new []float64
		want     string
	}{
		{"s", []float64{1.0, 1.1, 1.2}, []float64{0.5, 0.6, 0.7}, "better"},
		{"s", []float64{0.5, 0.6, 0.7}, []float64{1.0, 1.1, 1.2}, "worse"},
		{"MB/s", []float64{100, 110, 120}, []float64{300, 310, 320}, "better"},
		{"IOPS", []float64{3000, 3100, 3200}, []float64{1000, 1100, 1200}, "worse"},
		{"s", []float64{1, 1.2, 1.4}, []float64{0.9, 1, 1.1}, ""},                            // 0.2 of 0.2 + 0.1
		{"s", []float64{1, 1, 1}, []float64{1.005, 1.005, 1.005}, ""},                        // under 1 %
		{"requests", []float64{20, 20, 20}, []float64{21, 21, 21}, "worse"},                  // exact
		{"s", []float64{1, 1.01, 1.02, 1.03, 9}, []float64{0.5, 0.5, 0.5, 0.5, 8}, "better"}, // one odd run
		{"s", []float64{1, 1}, []float64{0.1, 0.1, 0.1}, "few"},
		{"s", []float64{1, 1, 1}, []float64{0.1}, "few"},
		{"s", []float64{0, 0, 0}, []float64{1, 1, 1}, "worse"},
	} {
		if got := (compared{f: Figure{Unit: c.unit}, old: c.old, new: c.new}).judge(); got != c.want {
			t.Errorf("%v to %v %s: %q, want %q", c.old, c.new, c.unit, got, c.want)
		}
	}
}

func TestSpread(t *testing.T) {
	for _, c := range []struct {
		in   []float64
		want float64
	}{{[]float64{7}, 0}, {[]float64{3, 1}, 1}, {[]float64{5, 1, 3}, 2}, {[]float64{100, 4, 1, 2, 3}, 2}} {
		if got := spread(c.in); got != c.want {
			t.Errorf("spread(%v) = %g, want %g", c.in, got, c.want)
		}
	}
}

func TestCompare(t *testing.T) {
	f := func(system string, v ...float64) Figure {
		return Figure{Measure: "cold start", Image: "debian", Link: "edge", System: system, Unit: "s", Values: v}
	}
	old := figuresOf("starts", f("varve", 2, 2, 2), f("ext4", 1, 1, 1), f("gone", 1))
	new := figuresOf("starts", f("ext4", 1, 1, 1), f("varve", 1, 1, 1), f("added", 1), f("added too", 1))
	var out strings.Builder
	if err := compareTo(&out, []string{"a.json", "b.json"}, old, new); err != nil {
		t.Fatal(err)
	}
	_, got, _ := strings.Cut(out.String(), "\n\n")
	const want = `     measure   image  link  system  unit   old   new  new/old
  cold start  debian  edge   varve     s  2.00  1.00     0.50  better
  cold start  debian  edge    ext4     s  1.00  1.00     1.00

2 figures: 1 better, 0 worse, 1 within the noise, 0 of too few runs. Only in a.json: 1. Only in b.json: 2.
`
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("table (-want +got):\n%s", d)
	}
	// The same names in the section of another measure are other figures.
	if err := compareTo(&out, []string{"a.json", "b.json"}, old, figuresOf("second", f("varve", 1))); err == nil || !strings.Contains(err.Error(), "no figure in common") {
		t.Errorf("nothing in common: %v", err)
	}
}

func TestCompareFiles(t *testing.T) {
	path := filepath.Join(t.TempDir(), "results.json")
	if err := replaceFigures(path, figures{Name: "starts", Figures: []Figure{{Measure: "m", System: "a", Unit: "s", Values: []float64{1}}}}); err != nil {
		t.Fatal(err)
	}
	text := filepath.Join(t.TempDir(), "RESULTS.md")
	if err := os.WriteFile(text, []byte("# Results"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{path}, "OLD.json NEW.json"},
		{[]string{path, path, path}, "OLD.json NEW.json"},
		{[]string{path, text}, text + " is no file of figures"},
		{[]string{path + ".gone", path}, "no such file"},
	} {
		if err := compareFiles(c.args); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("compare %q: %v, want %q", c.args, err, c.want)
		}
	}
}
