package main

import (
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// plotResults have a figure of every kind that is drawn.
func plotResults() results {
	var starts, local []Figure
	for _, image := range []string{"debian", "large"} {
		for _, at := range []string{"edge", "datacenter"} {
			starts = append(starts,
				Figure{Measure: measureStart, Image: image, Link: at, System: "B", Unit: "s", Values: []float64{0.3}},
				Figure{Measure: measureStart, Image: image, Link: at, System: "varve", Variant: "estargz", Unit: "s", Values: []float64{1.5, 0.9, 1.1}},
				Figure{Measure: measureStart, Image: image, Link: at, System: "<overlay & fs>", Unit: "s", Values: []float64{170, 165}},
				Figure{Measure: measureStart, Image: image, Link: at, System: "varve", Variant: "estargz", Unit: "MB", Values: []float64{0, 0}},
				Figure{Measure: measureStart, Image: image, Link: at, System: systemTOCs, Unit: "MB", Values: []float64{1}},
				Figure{Measure: measureStart, Image: image, Link: at, System: "varve", Variant: "estargz", Unit: "requests", Values: []float64{7}})
		}
	}
	for _, g := range localGoals {
		local = append(local, Figure{Measure: g.measure, System: g.system, Unit: g.unit, Values: []float64{3}})
		if g.system == "varve kernel" {
			local = append(local, Figure{Measure: g.measure, System: "ext4", Unit: g.unit, Values: []float64{2}},
				Figure{Measure: g.measure, System: "ext4", Unit: "requests", Values: []float64{2}})
		}
	}
	return results{resultsFormat, []figures{
		{Name: "starts", Figures: starts},
		{Name: "load", Figures: []Figure{{Measure: measureLoad, Image: "large", System: "varve kernel", Variant: "estargz", Unit: "MiB", Values: []float64{55}}}},
		{Name: localMeasure, Figures: local},
	}}
}

func TestPlots(t *testing.T) {
	plots := drawAll(plotResults())
	want := []string{"cold-start-at-datacenter-mb.svg", "cold-start-at-datacenter-s.svg", "cold-start-at-edge-mb.svg", "cold-start-at-edge-s.svg", "local.svg", "walk-and-whole-read-mib.svg"}
	if d := cmp.Diff(want, slices.Sorted(maps.Keys(plots))); d != "" {
		t.Errorf("plots (-want +got):\n%s", d)
	}
	again := drawAll(plotResults())
	for name, text := range plots {
		if string(again[name]) != string(text) {
			t.Errorf("%s differs from one time to the next", name)
		}
		if err := drawn(text); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	text := string(plots["cold-start-at-edge-s.svg"])
	for part, n := range map[string]int{"&lt;overlay &amp; fs&gt;": 1, ">debian<": 1, ">large<": 1, ">varve: estargz<": 1, `class="mark"`: 3, `class="range"`: 4, ">1.10<": 2, "prefers-color-scheme:dark": 1} {
		if got := strings.Count(text, part); got != n {
			t.Errorf("cold starts at edge have %q %d times, want %d", part, got, n)
		}
	}
	if text := string(plots["walk-and-whole-read-mib.svg"]); strings.Count(text, `class="target"`) != 1 {
		t.Errorf("memory has no target:\n%s", text)
	}
}

// drawn checks that a plot is well-formed and that all of it can be seen.
func drawn(text []byte) error {
	var width, height float64
	for d := xml.NewDecoder(strings.NewReader(string(text))); ; {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			if width == 0 || height == 0 {
				return errors.New("no size")
			}
			return nil
		}
		if err != nil {
			return err
		}
		e, ok := token.(xml.StartElement)
		if !ok {
			continue
		}
		at := map[string]float64{}
		for _, a := range e.Attr {
			if !slices.Contains([]string{"x", "y", "x1", "x2", "y1", "y2", "width", "height"}, a.Name.Local) {
				continue
			}
			x, err := strconv.ParseFloat(a.Value, 64)
			if err != nil {
				return fmt.Errorf("%s %s: %w", e.Name.Local, a.Name.Local, err)
			}
			at[a.Name.Local] = x
		}
		if e.Name.Local == "svg" {
			width, height = at["width"], at["height"]
			continue
		}
		for name, x := range at {
			most := width
			if strings.HasPrefix(name, "y") || name == "height" {
				most = height
			}
			if !(x >= 0 && x <= most) {
				return fmt.Errorf("%s at %s=%g is out of sight", e.Name.Local, name, x)
			}
		}
		if at["x"]+at["width"] > width+0.1 || at["y"]+at["height"] > height+0.1 {
			return fmt.Errorf("%s ends out of sight: %v", e.Name.Local, at)
		}
	}
}

func TestRatioChart(t *testing.T) {
	c := ratioChart(plotResults())
	got := map[string]bar{}
	for _, g := range c.groups {
		for _, b := range g.bars {
			got[g.label+" "+b.series] = b
		}
	}
	// Ours have 3 where ext4 has 2: half as long again, or two thirds for a speed.
	for name, want := range map[string]bar{
		"tar cold varve kernel":          {series: "varve kernel", value: 1.5, low: 1.5, high: 1.5, target: 0.5},
		"sequential cold varve fuse":     {series: "varve fuse", value: 1 / 1.5, low: 1 / 1.5, high: 1 / 1.5, target: 1 / 0.6},
		"random 4 KiB cold varve kernel": {series: "varve kernel", value: 1 / 1.5, low: 1 / 1.5, high: 1 / 1.5, target: 1 / 0.8},
	} {
		if got[name] != want {
			t.Errorf("%s: %+v, want %+v", name, got[name], want)
		}
	}
	if n := len(localGoals); len(got) != n {
		t.Errorf("%d bars, want %d", len(got), n)
	}
}

func TestScale(t *testing.T) {
	for _, c := range []struct {
		log    bool
		base   float64
		values []float64
		want   []float64
	}{
		{false, 0, []float64{3, 11}, []float64{0, 2, 4, 6, 8, 10, 12}},
		{false, 0, []float64{0.04}, []float64{0, 0.01, 0.02, 0.03, 0.04}},
		{true, 0, []float64{0.3, 170}, []float64{0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200}},
		{true, 1, []float64{2.5, 4}, []float64{1, 2, 5}},
		{true, 1, []float64{0.2, 0.4}, []float64{0.2, 0.5, 1}},
	} {
		ch := &chart{log: c.log, base: c.base}
		for _, v := range c.values {
			ch.add("g", fmt.Sprint(v), []float64{v}, false)
		}
		if d := cmp.Diff(c.want, newScale(ch).ticks); d != "" {
			t.Errorf("ticks for %v (-want +got):\n%s", c.values, d)
		}
	}
}

func TestWritePlots(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "plots")
	if err := writePlots(dir, plotResults()); err != nil {
		t.Fatal(err)
	}
	if names, err := os.ReadDir(dir); err != nil || len(names) != 6 {
		t.Errorf("%v, %v", names, err)
	}
	if err := writePlots(dir, results{Format: resultsFormat}); err == nil {
		t.Error("plots of nothing")
	}
}
