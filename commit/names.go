package commit

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
)

// object is a JSON object to be edited: the names keep their order, and the
// values that are not touched keep their bytes.
type object struct {
	fields []objectField
}

// objectField is one name of an object with its value.
type objectField struct {
	name  string
	key   []byte // the name as it was written, quotes and all
	value json.RawMessage
}

// parseObject reads an object from JSON that is known to be valid. Nothing and
// null give an empty one.
func parseObject(raw []byte) (*object, error) {
	o := &object{}
	if isNull(raw) {
		return o, nil
	}
	d := json.NewDecoder(bytes.NewReader(raw))
	if t, err := d.Token(); err != nil {
		return nil, err
	} else if t != json.Delim('{') {
		return nil, fmt.Errorf("%.20q where an object should be", bytes.TrimSpace(raw))
	}
	for d.More() {
		from := d.InputOffset()
		t, err := d.Token()
		if err != nil {
			return nil, err
		}
		name, ok := t.(string)
		if !ok {
			return nil, fmt.Errorf("%v where a name should be", t)
		}
		f := objectField{name: name, key: raw[from:d.InputOffset()]}
		// Before it may stand a comma and white space.
		f.key = f.key[bytes.IndexByte(f.key, '"'):]
		if err := d.Decode(&f.value); err != nil {
			return nil, err
		}
		o.fields = append(o.fields, f)
	}
	return o, nil
}

func isNull(raw []byte) bool {
	raw = bytes.TrimSpace(raw)
	return len(raw) == 0 || string(raw) == "null"
}

// find gives the place of a name, -1 if there is none. It is what encoding/json
// finds, and with it nearly all that reads images: the case does not matter,
// and of several the last counts.
func (o *object) find(name string) int {
	for i := len(o.fields) - 1; i >= 0; i-- {
		if strings.EqualFold(o.fields[i].name, name) {
			return i
		}
	}
	return -1
}

// get gives the value of a name, nil if there is none.
func (o *object) get(name string) json.RawMessage {
	if i := o.find(name); i >= 0 {
		return o.fields[i].value
	}
	return nil
}

// put sets the value of a name, in its place if it has one. It stands there
// once after that.
func (o *object) put(name string, value json.RawMessage) {
	f := objectField{name: name, key: encodeJSON(name), value: value}
	at := o.find(name)
	if at < 0 {
		o.fields = append(o.fields, f)
		return
	}
	o.fields[at] = f
	kept := o.fields[:0]
	for i, f := range o.fields {
		if i == at || !strings.EqualFold(f.name, name) {
			kept = append(kept, f)
		}
	}
	o.fields = kept
}

// set is put for a value to be encoded.
func (o *object) set(name string, value any) { o.put(name, encodeJSON(value)) }

// drop takes a name away.
func (o *object) drop(name string) {
	kept := o.fields[:0]
	for _, f := range o.fields {
		if !strings.EqualFold(f.name, name) {
			kept = append(kept, f)
		}
	}
	o.fields = kept
}

// bytes writes the object, with no white space of its own.
func (o *object) bytes() []byte {
	var b bytes.Buffer
	b.WriteByte('{')
	for i, f := range o.fields {
		if i > 0 {
			b.WriteByte(',')
		}
		b.Write(f.key)
		b.WriteByte(':')
		b.Write(f.value)
	}
	b.WriteByte('}')
	return b.Bytes()
}

// arrayOf writes an array of values that are JSON already.
func arrayOf(values []json.RawMessage) json.RawMessage {
	parts := make([][]byte, len(values))
	for i, v := range values {
		parts[i] = v
	}
	return append(append([]byte{'['}, bytes.Join(parts, []byte{','})...), ']')
}

// encodeJSON gives the JSON of a value of ours, names of maps sorted and < > &
// left as they are. Values of ours are strings, numbers, lists and maps of
// them: they cannot fail.
func encodeJSON(value any) json.RawMessage {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(value); err != nil {
		panic(fmt.Sprintf("encode %T: %v", value, err))
	}
	return bytes.TrimSuffix(b.Bytes(), []byte{'\n'})
}
