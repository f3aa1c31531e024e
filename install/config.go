package install

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

// table is a TOML table.
type table = map[string]any

// config is a configuration file of containerd's.
type config struct {
	path    string
	data    []byte // nil if there is no such file
	doc     table
	version int
	imports []string
}

// readConfig reads and understands one file.
func (n *Node) readConfig(path string) (*config, error) {
	data, err := n.read(path)
	if err != nil {
		return nil, err
	}
	return parseConfig(path, data)
}

func parseConfig(path string, data []byte) (*config, error) {
	c := &config{path: path, data: data, doc: table{}}
	if data == nil {
		return c, nil
	}
	if err := toml.Unmarshal(data, &c.doc); err != nil {
		var at *toml.DecodeError
		if errors.As(err, &at) {
			row, col := at.Position()
			return nil, fmt.Errorf("%s, line %d, column %d: %w", path, row, col, err)
		}
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	// containerd takes a file without a version for one of version 1.
	c.version = 1
	if v, ok := c.doc["version"]; ok {
		i, ok := v.(int64)
		if !ok || i < 0 || i > 99 {
			return nil, fmt.Errorf("%s: the version %v is none of containerd's", path, v)
		}
		c.version = max(1, int(i))
	}
	list, ok := c.doc["imports"].([]any)
	if _, there := c.doc["imports"]; there && !ok {
		return nil, fmt.Errorf("%s: imports is not a list", path)
	}
	for _, i := range list {
		s, ok := i.(string)
		if !ok {
			return nil, fmt.Errorf("%s: imports has %v, which is not a path", path, i)
		}
		c.imports = append(c.imports, s)
	}
	return c, nil
}

// absolute gives an import's path or pattern as containerd resolves it.
func (c *config) absolute(pattern string) string {
	pattern = filepath.Clean(pattern)
	if !filepath.IsAbs(pattern) {
		pattern = filepath.Join(filepath.Dir(c.path), pattern)
	}
	return pattern
}

// covers reports whether a file's imports take another file in.
func (c *config) covers(path string) bool {
	return slices.ContainsFunc(c.imports, func(p string) bool {
		p = c.absolute(p)
		ok, _ := filepath.Match(p, path)
		return p == path || ok && strings.Contains(p, "*") // else containerd takes no pattern in it
	})
}

// maxImports is how many files are read of one configuration.
const maxImports = 100

// merged gives what a configuration says with everything it imports but one file, in
// containerd's order. containerd 1 lets a later file's table of a plugin replace an
// earlier one's; later ones put them together.
func (n *Node) merged(main *config, without string, replacing bool) (table, error) {
	all := table{}
	seen := map[string]bool{}
	for pending := []*config{main}; len(pending) > 0; pending = pending[1:] {
		c := pending[0]
		if seen[c.path] {
			continue
		}
		if seen[c.path] = true; len(seen) > maxImports {
			return nil, fmt.Errorf("%s imports more than %d files", main.path, maxImports)
		}
		overlay(all, c.doc, replacing, 0)
		for _, p := range c.imports {
			paths := []string{c.absolute(p)}
			if strings.Contains(paths[0], "*") {
				found, err := filepath.Glob(n.real(paths[0]))
				if err != nil {
					return nil, fmt.Errorf("%s: import %s: %w", c.path, p, err)
				}
				paths = nil
				for _, f := range found {
					paths = append(paths, strings.TrimPrefix(f, strings.TrimSuffix(n.Prefix, "/")))
				}
			}
			for _, path := range paths {
				if path == without {
					continue
				}
				next, err := n.readConfig(path)
				if err != nil {
					return nil, err
				}
				if next.data == nil {
					return nil, fmt.Errorf("%s imports %s: %w", c.path, path, os.ErrNotExist)
				}
				pending = append(pending, next)
			}
		}
	}
	return all, nil
}

// overlay puts one table over another.
func overlay(to, from table, replacing bool, depth int) {
	for k, v := range from {
		below, isTable := v.(table)
		over, wasTable := to[k].(table)
		if isTable && wasTable && !(replacing && depth == 1) {
			over = maps.Clone(over)
			overlay(over, below, replacing, depth+1)
			to[k] = over
			continue
		}
		to[k] = v
	}
}

// at gives what stands at a path of keys, nil if nothing does.
func at(t table, keys ...string) any {
	var v any = t
	for _, k := range keys {
		t, ok := v.(table)
		if !ok {
			return nil
		}
		v = t[k]
	}
	return v
}

// put sets what stands at a path of keys, making tables on the way.
func put(t table, v any, keys ...string) {
	for _, k := range keys[:len(keys)-1] {
		next, ok := t[k].(table)
		if !ok {
			next = table{}
			t[k] = next
		}
		t = next
	}
	t[keys[len(keys)-1]] = v
}

// tablesAt gives a list of tables, however the reader typed it.
func tablesAt(t table, keys ...string) (out []table) {
	list, _ := at(t, keys...).([]any)
	for _, v := range list {
		if row, ok := v.(table); ok {
			out = append(out, row)
		}
	}
	return out
}

// clone copies tables all the way down.
func clone(v any) any {
	switch v := v.(type) {
	case table:
		out := table{}
		for k, x := range v {
			out[k] = clone(x)
		}
		return out
	case []any:
		out := make([]any, len(v))
		for i, x := range v {
			out[i] = clone(x)
		}
		return out
	}
	return v
}
