package main

import (
	"encoding/json"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestRecord(t *testing.T) {
	takeRecorded()
	values := []float64{1, 2}
	record(Figure{Measure: "m", System: "a", Unit: "s", Values: values})
	record(Figure{Measure: "m", System: "b", Unit: "s", Values: []float64{5}})
	record(Figure{Measure: "m", System: "a", Unit: "s", Values: []float64{3}})
	values[0] = 9
	want := []Figure{{Measure: "m", System: "a", Unit: "s", Values: []float64{1, 2, 3}}, {Measure: "m", System: "b", Unit: "s", Values: []float64{5}}}
	if d := cmp.Diff(want, takeRecorded()); d != "" {
		t.Errorf("recorded (-want +got):\n%s", d)
	}
	if got := takeRecorded(); got != nil {
		t.Errorf("taken twice: %v", got)
	}
}

func TestReplaceFigures(t *testing.T) {
	path := filepath.Join(t.TempDir(), "results.json")
	figure := func(v float64) Figure {
		return Figure{Measure: `<m> "q"`, Image: "python", Link: "edge", System: "varve", Variant: "profile", Unit: "s", Values: []float64{v, 0.1}}
	}
	for _, s := range []figures{
		{Name: "one", Machine: "old", Figures: []Figure{figure(1)}},
		{Name: "two", Machine: "kept", Figures: []Figure{figure(2), {Measure: "n", System: "B", Unit: "MB", Values: []float64{3}}}},
		{Name: "one", Machine: "new", Figures: []Figure{figure(4)}},
	} {
		if err := replaceFigures(path, s); err != nil {
			t.Fatal(err)
		}
	}
	got, err := readResults(path)
	if err != nil {
		t.Fatal(err)
	}
	want := results{resultsFormat, []figures{
		{Name: "one", Machine: "new", Figures: []Figure{figure(4)}},
		{Name: "two", Machine: "kept", Figures: []Figure{figure(2), {Measure: "n", System: "B", Unit: "MB", Values: []float64{3}}}},
	}}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("results (-want +got):\n%s", d)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(string(text), "\n"); n != 6 {
		t.Errorf("%d lines, want one a figure and one a section:\n%s", n, text)
	}
	for _, bad := range []Figure{{Measure: "m", System: "a", Unit: "s"}, {Measure: "m", System: "a", Unit: "s", Values: []float64{math.NaN()}}} {
		if err := replaceFigures(path, figures{Name: "one", Figures: []Figure{bad}}); err == nil || !strings.Contains(err.Error(), "one: m of a") {
			t.Errorf("%v: %v", bad.Values, err)
		}
	}
	if again, err := os.ReadFile(path); err != nil || string(again) != string(text) {
		t.Errorf("a bad figure changed the file: %v", err)
	}
}

func TestReadResultsRefuses(t *testing.T) {
	for text, want := range map[string]string{
		"":                "no file of figures that this program writes",
		"# Results":       "no file of figures that this program writes",
		`{"figures":[]}`:  "unknown field",
		`{"sections":[]}`: `its format is ""`,
		`{"format":"varve-bench/2","sections":[]}`:   `its format is "varve-bench/2"`,
		`{"format":"varve-bench/1","sections":[]}{}`: "something after",
		`{"format":"varve-bench/1","sections":[{"name":"n","machine":"","figures":[{"measure":"m","system":"a","unit":"s","values":[]}]}]}`: "m of a has no values",
	} {
		path := filepath.Join(t.TempDir(), "results.json")
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := readResults(path); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), path) {
			t.Errorf("%.50s: %v, want %q", text, err, want)
		}
	}
}

func TestResultsPath(t *testing.T) {
	for in, want := range map[string]string{"bench/RESULTS.md": "bench/results.json", "RESULTS.md": "results.json", "/x/y/Of.1.md": "/x/y/of.1.json"} {
		if got := resultsPath(in); got != want {
			t.Errorf("resultsPath(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestShort(t *testing.T) {
	for in, want := range map[float64]string{0: "0", 0.5: "0.500", 0.01234: "0.0123", 1.5: "1.50", 12.34: "12.3", 123.4: "123", 123456: "123456", -2.5: "-2.50"} {
		if got := short(in); got != want {
			t.Errorf("short(%g) = %q, want %q", in, got, want)
		}
	}
}

// figuresOf gives results of one measure.
func figuresOf(name string, f ...Figure) results {
	return results{resultsFormat, []figures{{Name: name, Machine: "a machine", Figures: f}}}
}

func TestFigureHasShortNames(t *testing.T) {
	text, err := json.Marshal(Figure{Measure: "m", System: "a", Unit: "s", Values: []float64{1.25}})
	if want := `{"measure":"m","system":"a","unit":"s","values":[1.25]}`; err != nil || string(text) != want {
		t.Errorf("%s, %v, want %s", text, err, want)
	}
}
