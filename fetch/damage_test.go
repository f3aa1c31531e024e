package fetch

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/varvefs/varve/bench/forms"
	"github.com/varvefs/varve/index"
)

func TestDamagedLayerIsMadeAgain(t *testing.T) {
	cut := func(b []byte) []byte { return b[:len(b)-1] }
	flip := func(b []byte) []byte { b[len(b)/2] ^= 1; return b }
	none := func([]byte) []byte { return nil }
	layers := []*layer{makeLayer(t, forms.EStargz, files()), makeLayer(t, forms.Zstd, files())}
	for name, test := range map[string]struct {
		file   string
		change func([]byte) []byte // nil removes it
	}{
		"presence file cut":      {"present", cut},
		"presence file empty":    {"present", none},
		"presence file garbled":  {"present", func(b []byte) []byte { b[0] ^= 1; return b }},
		"presence file gone":     {"present", nil},
		"frame table cut":        {"frames", cut},
		"frame table empty":      {"frames", none},
		"frame table garbled":    {"frames", flip},
		"frame table gone":       {"frames", nil},
		"about cut":              {"about.json", none},
		"about garbled":          {"about.json", func([]byte) []byte { return []byte("{") }},
		"about gone":             {"about.json", nil},
		"data gone":              {"data", nil},
		"data cut":               {"data", cut},
		"data empty":             {"data", none},
		"data longer":            {"data", func(b []byte) []byte { return append(b, 1) }},
		"table of contents cut":  {"toc", cut},
		"table of contents gone": {"toc", nil},
	} {
		for _, l := range layers {
			t.Run(name+"/"+l.MediaType, func(t *testing.T) {
				s := serve(t, l)
				m := on(t, t.TempDir(), quick)
				checkAll(t, m.open(t, l, s.origin(l)), l)
				m.close(t)
				if test.change != nil {
					m.edit(t, l, test.file, test.change)
				} else if err := os.Remove(m.path(l, test.file)); err != nil {
					t.Fatal(err)
				}
				before := resources(t)
				m = on(t, m.dir, quick)
				h := m.open(t, l, s.origin(l))
				if test.file == "toc" {
					// Whoever finds it gets an error, and the next a new layer.
					if _, err := h.Entries(); err == nil {
						t.Error("damaged names were read")
					}
					h.Close()
					h = m.open(t, l, s.origin(l))
				}
				checkAll(t, h, l)
				m.close(t)
				s.transport.CloseIdleConnections()
				if after := resources(t); after.mapped(m.dir) != before.mapped(m.dir) || after.opened(m.dir) != 0 {
					t.Errorf("%d mappings, %d descriptors are left", after.mapped(m.dir), after.opened(m.dir))
				}
				m = on(t, m.dir, quick)
				s.Reset()
				checkAll(t, m.open(t, l), l)
			})
		}
	}
}

func TestOpenChecksWholeLayers(t *testing.T) {
	for _, form := range streamedForms() {
		t.Run(string(form), func(t *testing.T) {
			good := makeLayer(t, form, files())
			other := makeLayer(t, form, files()[1:])
			for name, test := range map[string]struct {
				change func(l *layer)
				want   []error
			}{
				"another blob": {func(l *layer) { l.blob, l.Size, l.diffID = other.blob, other.Size, other.diffID }, []error{ErrVerify}},
				"wrong diffID": {func(l *layer) { l.diffID = other.diffID }, []error{ErrVerify}},
				"flipped bit":  {func(l *layer) { l.blob = slices.Clone(l.blob); l.blob[len(l.blob)/2] ^= 1 }, []error{ErrVerify, index.ErrMalformed}},
				"cut blob":     {func(l *layer) { l.blob = l.blob[:len(l.blob)-10] }, []error{ErrUnavailable}},
				"size too small": {func(l *layer) { l.blob, l.Size = l.blob[:len(l.blob)-700], l.Size-700 },
					[]error{ErrVerify, index.ErrMalformed}},
				"size too large": {func(l *layer) { l.Size++ }, []error{ErrUnavailable}},
			} {
				t.Run(name, func(t *testing.T) {
					l := *good
					test.change(&l)
					s := serve(t, &l)
					m := on(t, t.TempDir(), quick)
					_, err := m.Open(context.Background(), m.request(&l, s.origin(&l)))
					if !slices.ContainsFunc(test.want, func(w error) bool { return errors.Is(err, w) }) {
						t.Errorf("got %v, want one of %v", err, test.want)
					}
					for _, d := range []string{"layers", "tmp"} {
						if es, err := os.ReadDir(filepath.Join(m.dir, d)); err != nil || len(es) != 0 {
							t.Errorf("left in %s: %v, %v", d, es, err)
						}
					}
				})
			}
			// What another's config says of it is checked against what is known.
			s := serve(t, good)
			m := on(t, t.TempDir(), quick)
			m.open(t, good, s.origin(good))
			q := m.request(good, s.origin(good))
			q.DiffID = func() (string, error) { return other.diffID, nil }
			if _, err := m.Open(context.Background(), q); !errors.Is(err, ErrVerify) {
				t.Errorf("a wrong diffID of a layer in the store: %v", err)
			}
		})
	}
}

func TestOpenChecksTables(t *testing.T) {
	for _, form := range lazyForms() {
		t.Run(string(form), func(t *testing.T) {
			good := makeLayer(t, form, files())
			for name, change := range map[string]func(*layer){
				"cut blob":  func(l *layer) { l.blob, l.Size = l.blob[:len(l.blob)/2], l.Size/2 },
				"tiny blob": func(l *layer) { l.blob, l.Size = l.blob[:20], 20 },
				"no table": func(l *layer) {
					l.blob = slices.Clone(l.blob)
					clear(l.blob[len(l.blob)/2:])
				},
			} {
				t.Run(name, func(t *testing.T) {
					l := *good
					change(&l)
					s := serve(t, &l)
					m := on(t, t.TempDir(), quick)
					if _, err := m.Open(context.Background(), m.request(&l, s.origin(&l))); !errors.Is(err, index.ErrMalformed) {
						t.Errorf("got %v", err)
					}
					for _, d := range []string{"layers", "tmp"} {
						if es, err := os.ReadDir(filepath.Join(m.dir, d)); err != nil || len(es) != 0 {
							t.Errorf("left in %s: %v, %v", d, es, err)
						}
					}
				})
			}
		})
	}
}
