package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
)

// resultsFormat is the first thing that a file of figures says.
const resultsFormat = "varve-bench/1"

// resultsLimit is more than any file of figures, in bytes.
const resultsLimit = 64 << 20

// Figure is what was measured of one system at one work, turn by turn. What a
// field has no use for is empty.
type Figure struct {
	Measure string    `json:"measure"`           // what was measured: "cold start", "tar cold"
	Image   string    `json:"image,omitempty"`   // of the corpus, or what was read instead
	Link    string    `json:"link,omitempty"`    // "edge", "datacenter"; "" without a network
	System  string    `json:"system"`            // "varve kernel", "ext4", "B"
	Variant string    `json:"variant,omitempty"` // "no profile", "profile"
	Unit    string    `json:"unit"`              // "s", "CPU s", "MB", "MiB", "MB/s", "IOPS", "requests"
	Values  []float64 `json:"values"`            // one a turn, in order
}

// key tells figures apart, within their section.
func (f Figure) key() string {
	return strings.Join([]string{f.Measure, f.Image, f.Link, f.System, f.Variant, f.Unit}, "\x00")
}

// figures are those of one measure of this program, from one run.
type figures struct {
	Name    string   `json:"name"` // as it is called on the command line
	Machine string   `json:"machine"`
	Figures []Figure `json:"figures"`
}

// results is the file of figures beside RESULTS.md.
type results struct {
	Format   string    `json:"format"`
	Sections []figures `json:"sections"`
}

// recorded holds what the measure that runs has recorded so far.
var recorded struct {
	sync.Mutex
	figures []Figure
}

// record keeps a figure of the measure that runs. It is written when the measure
// has ended without an error. A second one of the same name adds its values.
func record(f Figure) {
	recorded.Lock()
	defer recorded.Unlock()
	f.Values = slices.Clone(f.Values)
	i := slices.IndexFunc(recorded.figures, func(g Figure) bool { return g.key() == f.key() })
	if i < 0 {
		recorded.figures = append(recorded.figures, f)
		return
	}
	recorded.figures[i].Values = append(recorded.figures[i].Values, f.Values...)
}

// takeRecorded gives what was recorded, and forgets it.
func takeRecorded() []Figure {
	recorded.Lock()
	defer recorded.Unlock()
	f := recorded.figures
	recorded.figures = nil
	return f
}

// resultsPath is the file of figures that stands beside a results file.
func resultsPath(out string) string {
	dir, name := filepath.Split(out)
	return filepath.Join(dir, strings.ToLower(strings.TrimSuffix(name, filepath.Ext(name)))+".json")
}

// readResults reads a file of figures. That there is none is os.ErrNotExist.
func readResults(path string) (r results, err error) {
	f, err := os.Open(path)
	if err != nil {
		return r, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, resultsLimit+1))
	if err != nil {
		return r, err
	}
	if len(text) > resultsLimit {
		return r, fmt.Errorf("%s is no file of figures: it is larger than %d MiB", path, resultsLimit>>20)
	}
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(&r); err != nil {
		return r, fmt.Errorf("%s is no file of figures that this program writes: %w", path, err)
	}
	if r.Format != resultsFormat {
		return r, fmt.Errorf("%s is no file of figures that this program reads: its format is %q, not %q", path, r.Format, resultsFormat)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return r, fmt.Errorf("%s has something after its figures", path)
	}
	for _, s := range r.Sections {
		for _, f := range s.Figures {
			if len(f.Values) == 0 {
				return r, fmt.Errorf("%s: %s of %s has no values", path, f.Measure, f.System)
			}
		}
	}
	return r, nil
}

// replaceFigures puts one measure's figures into the file, in place of those that
// it has of that measure; the others stay.
func replaceFigures(path string, s figures) error {
	r, err := readResults(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if i := slices.IndexFunc(r.Sections, func(old figures) bool { return old.Name == s.Name }); i >= 0 {
		r.Sections[i] = s
	} else {
		r.Sections = append(r.Sections, s)
	}
	text, err := r.text()
	if err != nil {
		return err
	}
	return os.WriteFile(path, text, 0o644)
}

// text is the file: one line a figure, so that a difference of two is legible.
func (r results) text() ([]byte, error) {
	var out bytes.Buffer
	fmt.Fprintf(&out, "{\"format\":%q,\"sections\":[", resultsFormat)
	for i, s := range r.Sections {
		if i > 0 {
			out.WriteByte(',')
		}
		name, err := json.Marshal(s.Name)
		if err != nil {
			return nil, err
		}
		machine, err := json.Marshal(s.Machine)
		if err != nil {
			return nil, err
		}
		fmt.Fprintf(&out, "\n{\"name\":%s,\"machine\":%s,\"figures\":[", name, machine)
		for j, f := range s.Figures {
			if len(f.Values) == 0 {
				return nil, fmt.Errorf("%s: %s of %s has no values", s.Name, f.Measure, f.System)
			}
			line, err := json.Marshal(f)
			if err != nil {
				return nil, fmt.Errorf("%s: %s of %s: %w", s.Name, f.Measure, f.System, err)
			}
			if j > 0 {
				out.WriteByte(',')
			}
			out.WriteByte('\n')
			out.Write(line)
		}
		out.WriteString("]}")
	}
	out.WriteString("]}\n")
	return out.Bytes(), nil
}

// higherIsBetter tells speeds from what shall be small.
func higherIsBetter(unit string) bool { return unit == "IOPS" || strings.HasSuffix(unit, "/s") }

// short shows a number with three digits and no exponent.
func short(x float64) string {
	digits := 0
	for y := math.Abs(x); y > 0 && y < 100 && digits < 6; y *= 10 {
		digits++
	}
	return strconv.FormatFloat(x, 'f', digits, 64)
}

func highest[T ~int64 | ~float64](v []T) T {
	if len(v) == 0 {
		return 0
	}
	return slices.Max(v)
}
