package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestGoals(t *testing.T) {
	f := func(image, system, unit string, v float64) Figure {
		return Figure{Measure: "m", Image: image, Link: "edge", System: system, Unit: unit, Values: []float64{v}}
	}
	r := figuresOf("s",
		f("a", "varve", "s", 1), f("a", "rival", "s", 2), f("b", "varve", "s", 3), f("b", "rival", "s", 2), f("c", "varve", "s", 3),
		f("a", "varve", "MB/s", 90), f("a", "rival", "MB/s", 100), f("a", "varve", "MB", 13), f("a", "TOCs", "MB", 2), f("a", "rival", "MB", 10),
		f("a", "varve", "MiB", 70), Figure{Measure: "m", Image: "a", Link: "elsewhere", System: "varve", Unit: "s", Values: []float64{50}})
	all := goal{section: "s", measure: "m", link: "edge", unit: "s", system: "varve", rival: "rival", want: 1}
	with := func(change func(*goal)) goal {
		g := all
		change(&g)
		return g
	}
	for _, c := range []struct {
		name    string
		g       goal
		want    []reached
		target  string
		verdict string
	}{
		{"each image with a rival", all, []reached{{"a", "rival", 0.5, 1, 2, true}, {"b", "rival", 1.5, 3, 2, false}}, "<= 1", "missed by b"},
		{"one image", with(func(g *goal) { g.image = "a" }), []reached{{"a", "rival", 0.5, 1, 2, true}}, "<= 1", "reached"},
		{"none", with(func(g *goal) { g.rival = "nobody" }), nil, "<= 1", "not measured"},
		{"another rival", with(func(g *goal) { g.image, g.rival, g.instead = "a", "nobody", "rival" }), []reached{{"a", "rival", 0.5, 1, 2, true}}, "<= 1", "reached"},
		{"a speed", with(func(g *goal) { g.unit, g.want = "MB/s", 0.8 }), []reached{{"a", "rival", 0.9, 90, 100, true}}, ">= 0.8", "reached"},
		{"a speed too low", with(func(g *goal) { g.unit, g.want = "MB/s", 0.95 }), []reached{{"a", "rival", 0.9, 90, 100, false}}, ">= 0.95", "missed"},
		{"something added", with(func(g *goal) { g.image, g.want, g.aside = "b", 1.3, 0.4 }), []reached{{"b", "rival", 1, 3, 2, true}}, "<= 1.3 of it + 0.4 s", "reached"},
		{"something taken off", with(func(g *goal) { g.unit, g.want, g.less = "MB", 1.15, "TOCs" }), []reached{{"a", "rival", 1.1, 11, 10, true}}, "<= 1.15", "reached"},
		{"for itself", with(func(g *goal) { g.unit, g.want, g.absolute = "MiB", 64, true }), []reached{{"a", "rival", 70, 70, 0, false}}, "<= 64 MiB", "missed"},
	} {
		got := c.g.of(r)
		if d := cmp.Diff(c.want, got, cmp.AllowUnexported(reached{})); d != "" {
			t.Errorf("%s (-want +got):\n%s", c.name, d)
		}
		if target, verdict := c.g.target(), judged(got); target != c.target || verdict != c.verdict {
			t.Errorf("%s: %q %q, want %q %q", c.name, target, verdict, c.target, c.verdict)
		}
	}
}

func TestTableMeasures(t *testing.T) {
	chosen, err := choose([]string{tableVerb})
	if err != nil {
		t.Fatal(err)
	}
	sections := map[string]bool{}
	for _, m := range chosen {
		sections[m.name] = true
	}
	if len(chosen) != len(tableMeasures) {
		t.Errorf("the table's measures are %d of %v", len(chosen), tableMeasures)
	}
	for _, g := range tableGoals() {
		if !sections[g.section] {
			t.Errorf("a goal of %q, which the table does not measure: %+v", g.section, g)
		}
	}
}

func TestSummed(t *testing.T) {
	b := &bench{out: filepath.Join(t.TempDir(), "RESULTS.md")}
	for _, title := range []string{"Walks", "Local reads", tableTitle} {
		if err := replaceSection(b.out, title, "of "+title); err != nil {
			t.Fatal(err)
		}
	}
	figure := func(system string, v float64) Figure {
		return Figure{Measure: measureTar, Image: "100000 files", System: system, Unit: "s", Values: []float64{v}}
	}
	if err := replaceFigures(resultsPath(b.out), figures{Name: localMeasure, Machine: "this machine", Figures: []Figure{figure("ext4", 4), figure("varve kernel", 1), figure("varve fuse", 5)}}); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := b.summed(); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(b.out)
	if err != nil {
		t.Fatal(err)
	}
	rest, ok := strings.CutPrefix(string(text), preamble+"\n## "+tableTitle+"\n")
	if !ok {
		t.Fatalf("the table is not at the top:\n%s", text)
	}
	for _, line := range []string{
		"| varve kernel | ext4 | s | <= 0.5 | 0.25 | reached |\n",
		"| varve fuse | ext4 | s | <= 1 | 1.25 | missed |\n",
		"| varve: estargz | overlayfs: gzip | s | <= 1.05 |  | not measured |\n",
		"- `local`: this machine\n",
		"Plots: [Local reads in proportion to ext4](plots/local.svg).\n",
	} {
		if !strings.Contains(rest, line) {
			t.Errorf("no line %q in\n%s", line, rest)
		}
	}
	if !strings.HasSuffix(rest, "\n## Walks\n\nof Walks\n\n## Local reads\n\nof Local reads\n") {
		t.Errorf("the other sections:\n%s", rest)
	}
	if _, err := os.Stat(filepath.Join(plotsDir(b.out), "local.svg")); err != nil {
		t.Error(err)
	}
}
