package commit

import (
	"encoding/json"
	"testing"
)

func TestObject(t *testing.T) {
	for _, tt := range []struct {
		in   string
		edit func(*object)
		want string
	}{
		{`{}`, func(*object) {}, `{}`},
		{"\n{ \"a\" :\t1 , \"\\u0062\" : { \"<\" : [ ] } }", func(*object) {}, `{"a":1,"\u0062":{ "<" : [ ] }}`},
		{`{"a":1,"b":2,"c":3}`, func(o *object) { o.set("b", "<&>") }, `{"a":1,"b":"<&>","c":3}`},
		{`{"a":1}`, func(o *object) { o.set("z", []int{1}); o.set("y", map[string]int{"b": 1, "a": 2}) }, `{"a":1,"z":[1],"y":{"a":2,"b":1}}`},
		{`{"a":1,"b":2,"a":3}`, func(o *object) { o.set("a", 4) }, `{"b":2,"a":4}`},
		{`{"A":1,"b":2}`, func(o *object) { o.set("a", 4) }, `{"a":4,"b":2}`},
		{`{"A":1,"b":2,"a":3}`, func(o *object) { o.drop("a") }, `{"b":2}`},
		{`null`, func(o *object) { o.set("a", 1) }, `{"a":1}`},
		{``, func(o *object) { o.drop("a") }, `{}`},
	} {
		o, err := parseObject([]byte(tt.in))
		if err != nil {
			t.Errorf("%s: %v", tt.in, err)
			continue
		}
		tt.edit(o)
		if got := string(o.bytes()); got != tt.want {
			t.Errorf("%s: %s, want %s", tt.in, got, tt.want)
		}
	}
	for _, bad := range []string{`[]`, `1`, `"x"`} {
		if _, err := parseObject([]byte(bad)); err == nil {
			t.Error(bad)
		}
	}
}

func FuzzObject(f *testing.F) {
	f.Add([]byte(`{"a":1, "\u0041":{"x":[1e9,"\ud800"]},"a":null}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		var any map[string]json.RawMessage
		if json.Unmarshal(raw, &any) != nil {
			return
		}
		o, err := parseObject(raw)
		if err != nil {
			t.Fatal(err)
		}
		var same map[string]json.RawMessage
		if err := json.Unmarshal(o.bytes(), &same); err != nil || len(same) != len(any) {
			t.Fatalf("%s: %v", o.bytes(), err)
		}
		for k, v := range any {
			if string(same[k]) != string(v) {
				t.Errorf("%q: %s, want %s", k, same[k], v)
			}
		}
		o.set("x", 1)
		if !json.Valid(o.bytes()) {
			t.Errorf("%s", o.bytes())
		}
	})
}
