package main

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// plotVerb draws the plots of a file of figures.
const plotVerb = "plot"

// plotsName is the directory of plots beside a results file.
const plotsName = "plots"

func plotsDir(out string) string { return filepath.Join(filepath.Dir(out), plotsName) }

func plotFile(args []string) error {
	if len(args) != 2 {
		return fmt.Errorf("%s RESULTS.json DIR: a file of figures, and where the plots go", plotVerb)
	}
	r, err := readResults(args[0])
	if err != nil {
		return err
	}
	return writePlots(args[1], r)
}

// writePlots draws all plots that the figures suffice for. Those that a directory
// has of others stay.
func writePlots(dir string, r results) error {
	plots := drawAll(r)
	if len(plots) == 0 {
		return errors.New("no figure that there is a plot of")
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for name, text := range plots {
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// drawAll gives the plots by the names of their files.
func drawAll(r results) map[string][]byte {
	plots := map[string][]byte{}
	for _, c := range charts(r) {
		plots[c.file] = c.svg()
	}
	return plots
}

// charts are those that the figures suffice for.
func charts(r results) []chart {
	all := append(linkCharts(r), ratioChart(r))
	return slices.DeleteFunc(all, func(c chart) bool { return len(c.groups) == 0 })
}

// plotted says which units have plots, and what their axes are called.
var plotted = map[string]string{"s": "seconds", "MB": "MB", "MiB": "MiB", "CPU s": "CPU seconds"}

// linkCharts are a chart for each measure over a link, and for each of memory: a
// group an image, a bar a system. What is a bound and no system is a mark.
func linkCharts(r results) (charts []chart) {
	for _, s := range r.Sections {
		if s.Name == localMeasure {
			continue
		}
		for _, f := range s.Figures {
			axis := plotted[f.Unit]
			if axis == "" || f.Measure == "" || f.System == systemTOCs {
				continue
			}
			title := strings.ToUpper(f.Measure[:1]) + f.Measure[1:]
			if f.Link != "" {
				title += " at " + f.Link
			}
			file := slug(title+" "+f.Unit) + ".svg"
			i := slices.IndexFunc(charts, func(c chart) bool { return c.file == file })
			if i < 0 {
				i = len(charts)
				charts = append(charts, chart{file: file, title: title + ", " + axis, note: "Medians; thin lines from the least to the greatest run. Upright marks: what is to be reached.", axis: axis})
			}
			charts[i].add(cmp.Or(f.Image, f.Measure), named(f.System, f.Variant), f.Values, isBound(f))
			for _, g := range daemonGoals {
				if g.absolute && g.isOurs(f) {
					charts[i].target(f.Image, named(f.System, f.Variant), g.want)
				}
			}
		}
	}
	for i := range charts {
		charts[i].log = charts[i].spans(20)
	}
	return charts
}

// isBound reports whether a figure is no system's but a bound.
func isBound(f Figure) bool {
	return f.System == systemBound
}

// ratioChart shows the local measures in proportion to ext4, all so that left is
// better.
func ratioChart(r results) chart {
	c := chart{file: "local.svg", title: "Local reads in proportion to ext4", log: true, base: 1, axis: "time or CPU, of ext4's (a speed's inverse); left of 1 is better",
		note: "Medians. Marks: targets."}
	for _, s := range r.Sections {
		if s.Name != localMeasure {
			continue
		}
		for _, g := range localGoals {
			rival := s.find(Figure{Measure: g.measure, System: g.rival, Unit: g.unit})
			if len(rival) == 0 || median(rival) == 0 {
				continue
			}
			for _, f := range s.Figures {
				if f.Measure != g.measure || f.Unit != g.unit || f.Variant != "" || f.System == g.rival || median(f.Values) == 0 || c.has(g.measure, f.System) {
					continue
				}
				ratio := median(f.Values) / median(rival)
				if higherIsBetter(f.Unit) {
					ratio = 1 / ratio
				}
				c.add(g.measure, f.System, []float64{ratio}, false)
			}
			want := g.want
			if higherIsBetter(g.unit) {
				want = 1 / want
			}
			c.target(g.measure, g.system, want)
		}
	}
	return c
}

// find gives the values of the first figure of a section whose measure, system,
// unit, variant, image and link are those of f; "" of image and link is any.
func (s figures) find(f Figure) []float64 {
	for _, g := range s.Figures {
		if g.Measure == f.Measure && g.System == f.System && g.Unit == f.Unit && g.Variant == f.Variant &&
			(f.Image == "" || g.Image == f.Image) && (f.Link == "" || g.Link == f.Link) {
			return g.Values
		}
	}
	return nil
}

// slug makes the name of a file from a title.
func slug(s string) string {
	var out strings.Builder
	for _, r := range strings.ToLower(s) {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' {
			out.WriteRune(r)
		} else if n := out.Len(); n > 0 && !strings.HasSuffix(out.String(), "-") {
			out.WriteByte('-')
		}
	}
	return strings.Trim(out.String(), "-")
}
