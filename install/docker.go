package install

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"

	"github.com/go-json-experiment/json/jsontext"
)

// Docker is a Docker whose images are to lie on a snapshotter of its containerd's.
type Docker struct {
	Node
	Name string // of the snapshotter in containerd
}

// dockerConfig is the daemon's configuration.
const dockerConfig = "/etc/docker/daemon.json"

// The keys that Docker needs: that containerd keeps its images, and with which
// snapshotter.
const (
	featuresKey = "features"
	featureKey  = "containerd-snapshotter"
	driverKey   = "storage-driver"
)

// object is a JSON object in a text: its members, and where they begin.
type object struct {
	members map[string]member
	begin   int
}

// member is a value, and where it begins in the text.
type member struct {
	value string
	at    int
}

// readObject reads the object at the beginning of a text, from an offset on.
func readObject(data []byte, from int) (object, error) {
	o := object{members: map[string]member{}}
	dec := jsontext.NewDecoder(bytes.NewReader(data[from:]))
	t, err := dec.ReadToken()
	if err != nil {
		return o, err
	}
	if t.Kind() != '{' {
		return o, fmt.Errorf("it is not an object")
	}
	o.begin = from + int(dec.InputOffset())
	for dec.PeekKind() != '}' {
		k, err := dec.ReadToken()
		if err != nil {
			return o, err
		}
		key := k.String()
		v, err := dec.ReadValue()
		if err != nil {
			return o, err
		}
		o.members[key] = member{string(v), from + int(dec.InputOffset()) - len(v)}
	}
	_, err = dec.ReadToken()
	return o, err
}

// insertion is a text to be put into the configuration.
type insertion struct {
	at   int
	text string
}

func (d *Docker) driver() string { return fmt.Sprintf("\n  %q: %q,", driverKey, d.Name) }

const (
	wholeFeatures = "\n  \"" + featuresKey + "\": {\"" + featureKey + "\": true},"
	oneFeature    = "\"" + featureKey + "\": true, "
)

// created is a configuration where there was none, or nothing in it.
func (d *Docker) created() []byte {
	return []byte("{\n  \"" + featuresKey + "\": {\"" + featureKey + "\": true},\n  \"" + driverKey + "\": " + strconv.Quote(d.Name) + "\n}\n")
}

// PlanInstall finds out what Docker's configuration lacks. It changes nothing.
func (d *Docker) PlanInstall(context.Context) (Changes, error) {
	old, err := d.read(dockerConfig)
	if err != nil {
		return nil, err
	}
	text, err := d.with(old)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", dockerConfig, err)
	}
	if bytes.Equal(text, old) {
		return nil, nil
	}
	if err := d.editable(dockerConfig); err != nil {
		return nil, fmt.Errorf("%w: it needs %q: %q and %q: {%q: true}", err, driverKey, d.Name, featuresKey, featureKey)
	}
	var cs Changes
	if old != nil {
		was, err := d.read(kept(dockerConfig))
		if err != nil {
			return nil, err
		}
		cs.add(kept(dockerConfig), was, old)
	}
	cs.add(dockerConfig, old, text)
	return cs, nil
}

// with gives a configuration with what is needed in it; all else stays as it was
// written.
func (d *Docker) with(old []byte) ([]byte, error) {
	if len(bytes.TrimSpace(old)) == 0 {
		return d.created(), nil
	}
	if !json.Valid(old) { // which says where; the other reader only that
		var v any
		return nil, json.Unmarshal(old, &v)
	}
	top, err := readObject(old, 0)
	if err != nil {
		return nil, err
	}
	if len(top.members) == 0 {
		return d.created(), nil
	}
	var add []insertion
	switch v, there := top.members[driverKey]; {
	case !there:
		add = append(add, insertion{top.begin, d.driver()})
	case v.value != strconv.Quote(d.Name):
		return nil, fmt.Errorf("it sets %s to %s, whose images Docker would not show any more: remove that key yourself if it may go", driverKey, v.value)
	}
	switch v, there := top.members[featuresKey]; {
	case !there:
		add = append(add, insertion{top.begin, wholeFeatures})
	default:
		in, err := readObject(old, v.at)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", featuresKey, err)
		}
		switch f, there := in.members[featureKey]; {
		case there && f.value != "true":
			return nil, fmt.Errorf("it sets %s.%s to %s: change that yourself if images may move to containerd", featuresKey, featureKey, f.value)
		case !there:
			text := oneFeature
			if len(in.members) == 0 {
				text = text[:len(text)-2]
			}
			add = append(add, insertion{in.begin, text})
		}
	}
	text := slices.Clone(old)
	slices.SortStableFunc(add, func(a, b insertion) int { return b.at - a.at }) // from the end on
	for _, i := range add {
		text = slices.Insert(text, i.at, []byte(i.text)...)
	}
	return text, nil
}

// PlanUninstall finds out what to take out of Docker's configuration again. It changes
// nothing.
func (d *Docker) PlanUninstall(context.Context) (Changes, error) {
	now, err := d.read(dockerConfig)
	if err != nil || now == nil {
		return nil, err
	}
	was, err := d.read(kept(dockerConfig))
	if err != nil {
		return nil, err
	}
	var cs Changes
	text := now
	if before, err := d.with(was); err == nil && bytes.Equal(before, now) {
		text = was
	} else if was != nil { // others have written to it since
		for _, s := range []string{d.driver(), wholeFeatures, oneFeature} {
			text = bytes.Replace(text, []byte(s), nil, 1)
		}
		if top, err := readObject(text, 0); err != nil || top.members[driverKey].value == strconv.Quote(d.Name) {
			return nil, fmt.Errorf("%s was written anew since: remove %q and perhaps %q from it by hand", dockerConfig, driverKey, featuresKey)
		}
	} else if top, err := readObject(now, 0); err == nil && top.members[driverKey].value == strconv.Quote(d.Name) {
		return nil, fmt.Errorf("%s was written anew since: remove %q and perhaps %q from it by hand", dockerConfig, driverKey, featuresKey)
	}
	if bytes.Equal(text, now) && text != nil {
		return nil, nil
	}
	cs.add(dockerConfig, now, text)
	cs.add(kept(dockerConfig), was, nil)
	return cs, nil
}

// Do writes Docker's configuration. Docker is not restarted: its containers would stop.
func (d *Docker) Do(_ context.Context, cs Changes) (report []string, err error) {
	if _, err := d.apply(cs); err != nil {
		return nil, err
	}
	report = wrote(cs)
	if len(cs) > 0 {
		report = append(report, "restart Docker when its containers may stop: systemctl restart docker")
	}
	return report, nil
}
