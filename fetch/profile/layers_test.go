package profile

import (
	"errors"
	"runtime"
	"strings"
	"testing"
)

// TestDecodeManyLayers proves that a profile which names millions of layers takes no
// memory for them.
func TestDecodeManyLayers(t *testing.T) {
	for name, one := range map[string]string{"empty": "{}", "null": "null", "numbers": `{"size":1}`} {
		b := packed(t, `{"varve_profile":1,"layers":[`+strings.Repeat(one+",", (maxDecoded-100)/(len(one)+1))+one+`]}`)
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err := Decode(b)
		runtime.ReadMemStats(&after)
		if n := after.TotalAlloc - before.TotalAlloc; !errors.Is(err, ErrMalformed) || n > 8*maxDecoded {
			t.Errorf("%s: %d bytes allocated, %v", name, n, err)
		}
	}
	d := plain()
	for len(d.Layers) < maxLayers {
		d.Layers = append(d.Layers, d.Layers[0])
	}
	if _, err := Decode(packed(t, d)); err != nil {
		t.Errorf("as many as may be: %v", err)
	}
}
