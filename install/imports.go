package install

import (
	"bytes"
	"fmt"
	"slices"
	"strconv"

	"github.com/pelletier/go-toml/v2/unstable"
)

// marked ends a line that was added to a file of somebody else's.
const marked = " # added by varve install"

// element is an element of the list of imports: where it lies in the text.
type element struct {
	text       string
	start, end int
}

// layout is what has to be known of a file's text to change its imports.
type layout struct {
	version  int // where the line with the version begins; -1 if none does
	imports  int // where the line with the imports begins; -1
	open     int // behind the bracket that opens the list
	elements []element
}

// layOut finds the top-level keys in a text that is TOML.
func layOut(data []byte) (layout, error) {
	l := layout{version: -1, imports: -1}
	var p unstable.Parser
	p.Reset(data)
	for p.NextExpression() {
		e := p.Expression()
		if e.Kind == unstable.Table || e.Kind == unstable.ArrayTable {
			break
		}
		if e.Kind != unstable.KeyValue {
			continue
		}
		key := e.Key()
		key.Next()
		name, raw := string(key.Node().Data), key.Node().Raw
		if !key.IsLast() {
			continue
		}
		line := bytes.LastIndexByte(data[:raw.Offset], '\n') + 1
		switch name {
		case "version":
			l.version = line
		case "imports":
			l.imports = line
			bracket := bytes.IndexByte(data[raw.Offset+raw.Length:], '[')
			if bracket < 0 {
				return l, fmt.Errorf("imports is not a list")
			}
			l.open = int(raw.Offset+raw.Length) + bracket + 1
			for it := e.Value().Children(); it.Next(); {
				n := it.Node()
				if n.Kind == unstable.String {
					l.elements = append(l.elements, element{string(n.Data), int(n.Raw.Offset), int(n.Raw.Offset + n.Raw.Length)})
				}
			}
		}
	}
	return l, p.Error()
}

// importLine is the line that is added where a file imports nothing.
func importLine(pattern, eol string) string {
	return "imports = [" + strconv.Quote(pattern) + "]" + marked + eol
}

// lineEnd gives how a text ends its lines.
func lineEnd(data []byte) string {
	if i := bytes.IndexByte(data, '\n'); i > 0 && data[i-1] == '\r' {
		return "\r\n"
	}
	return "\n"
}

// addImport gives a configuration's text with one import more, the last of all. What
// it adds is what [removeImport] takes away, whatever else was changed in between.
func addImport(data []byte, pattern string) ([]byte, error) {
	l, err := layOut(data)
	if err != nil {
		return nil, err
	}
	insert := func(where int, s string) ([]byte, error) {
		return slices.Concat(data[:where], []byte(s), data[where:]), nil
	}
	switch {
	case len(l.elements) > 0:
		return insert(l.elements[len(l.elements)-1].end, ", "+strconv.Quote(pattern))
	case l.imports >= 0:
		return insert(l.open, strconv.Quote(pattern))
	case l.version >= 0:
		return insert(l.version, importLine(pattern, lineEnd(data)))
	}
	return nil, fmt.Errorf("no line says its version")
}

// removeImport takes away what addImport added; it gives the text unchanged if there
// is nothing of that kind.
func removeImport(data []byte, pattern string) ([]byte, error) {
	l, err := layOut(data)
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(l.elements, func(e element) bool { return e.text == pattern })
	if i < 0 {
		return data, nil
	}
	from, to := l.elements[i].start, l.elements[i].end
	line := importLine(pattern, lineEnd(data))
	switch {
	case bytes.HasPrefix(data[l.imports:], []byte(line)):
		from, to = l.imports, l.imports+len(line)
	case i > 0:
		from = l.elements[i-1].end
	case len(l.elements) > 1:
		to = l.elements[1].start
	}
	return slices.Concat(data[:from], data[to:]), nil
}
