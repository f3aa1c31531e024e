package install

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

// dump gives the whole configuration as containerd understands it, its defaults and
// its imports in it.
func (c *Containerd) dump(ctx context.Context, s *site, path string) (table, error) {
	args := []string{"--config", path, "config", "dump"}
	if !c.exists(path) { // containerd starts with its defaults then
		args = []string{"config", "default"}
	}
	out, err := c.run(ctx, c.program(s.flavor), args...)
	if err != nil {
		return nil, fmt.Errorf("containerd does not take %s: %w", path, err)
	}
	t := table{}
	if err := toml.Unmarshal(out, &t); err != nil {
		return nil, fmt.Errorf("what containerd says of %s: %w", path, err)
	}
	return t, nil
}

// candidate is the file that containerd is to read once the changes are made. That of
// k3s or rke2 is generated from a template at their next start, so for the check it is
// made here; done removes it.
func (c *Containerd) candidate(s *site, cs Changes) (path string, done func(), err error) {
	if s.flavor == Plain || !cs.touches(s.importIn) {
		return s.main.path, func() {}, nil
	}
	f, err := os.CreateTemp(c.real(filepath.Dir(s.main.path)), ".varve-*.toml")
	if err != nil {
		return "", nil, err
	}
	done = func() { os.Remove(f.Name()) }
	text, err := addImport(s.main.data, s.pattern)
	if err == nil {
		_, err = f.Write(text)
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		done()
		return "", nil, err
	}
	return filepath.Join(filepath.Dir(s.main.path), filepath.Base(f.Name())), done, nil
}

// verify compares what containerd makes of the changed files with what was wanted,
// and everything else with what it was, if that is given.
func verify(d *dropIn, before, after table) error {
	for _, w := range d.want {
		if got := at(after, w.keys...); !covered(got, w.value) {
			return fmt.Errorf("containerd takes %v for %s, not the drop-in's %v: remove it from its other files", got, strings.Join(w.keys, "."), w.value)
		}
	}
	if before == nil {
		return nil
	}
	allowed := [][]string{{"version"}, {"imports"}}
	for _, w := range d.want {
		allowed = append(allowed, w.keys)
	}
	if where := differs(before, after, nil, allowed); where != nil {
		return fmt.Errorf("it would also change %s from %v to %v", strings.Join(where, "."), at(before, where...), at(after, where...))
	}
	return nil
}

// covered reports whether containerd has what was wanted, perhaps with more keys in it.
func covered(got, want any) bool {
	switch want := want.(type) {
	case table:
		t, ok := got.(table)
		for k, v := range want {
			ok = ok && covered(t[k], v)
		}
		return ok
	case []any:
		l, ok := got.([]any)
		ok = ok && len(l) == len(want)
		for i := 0; ok && i < len(want); i++ {
			ok = covered(l[i], want[i])
		}
		return ok
	}
	return reflect.DeepEqual(got, want) || want == false && got == nil
}

// differs gives the first place where two tables differ outside of those allowed.
func differs(a, b table, path []string, allowed [][]string) []string {
	keys := map[string]bool{}
	for k := range a {
		keys[k] = true
	}
	for k := range b {
		keys[k] = true
	}
	var names []string
	for k := range keys {
		names = append(names, k)
	}
	slices.Sort(names)
	for _, k := range names {
		here := append(slices.Clone(path), k)
		if slices.ContainsFunc(allowed, func(p []string) bool { return slices.Equal(p, here) }) {
			continue
		}
		at, aTable := a[k].(table)
		bt, bTable := b[k].(table)
		if (aTable || a[k] == nil) && (bTable || b[k] == nil) && (aTable || bTable) {
			if where := differs(at, bt, here, allowed); where != nil {
				return where
			}
			continue
		}
		if !reflect.DeepEqual(a[k], b[k]) && !(nothing(a[k]) && nothing(b[k])) {
			return here
		}
	}
	return nil
}

// nothing reports whether a value is as good as none to containerd.
func nothing(v any) bool {
	switch v := v.(type) {
	case []any:
		return len(v) == 0
	case table:
		return len(v) == 0
	}
	return v == nil || reflect.ValueOf(v).IsZero()
}
