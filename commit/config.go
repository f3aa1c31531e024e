package commit

import (
	"encoding/json"
	"fmt"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/varvefs/varve/image"
)

// newConfig makes the config of the new image from the bytes of its base's:
// what is not changed here keeps its bytes. It has a layer for each of the kept
// ones, and diffID, unless that is "".
func newConfig(base []byte, layers int, diffID digest.Digest, m Meta) ([]byte, error) {
	was, err := image.ParseConfig(base)
	if err != nil {
		return nil, err
	}
	diffIDs, err := was.DiffIDs(layers)
	if err != nil {
		return nil, err
	}
	o, err := parseObject(base)
	if err != nil {
		return nil, fmt.Errorf("image config: %w", err)
	}
	history, err := oldHistory(o, layers, m.Squash)
	if err != nil {
		return nil, err
	}
	diffIDs = diffIDs[: layers-m.Squash : layers-m.Squash]
	if diffID != "" {
		diffIDs = append(diffIDs, diffID)
	}

	entry := ocispec.History{Author: m.Author, CreatedBy: m.CreatedBy, Comment: m.Comment, EmptyLayer: diffID == ""}
	if m.Created.IsZero() {
		o.drop("created")
	} else {
		created := m.Created.UTC()
		entry.Created = &created
		o.set("created", created)
	}
	// Who is not named here did not make the layer, but may have made the image.
	if m.Author != "" {
		o.set("author", m.Author)
	}
	if !m.Changes.IsZero() {
		run, err := m.Changes.apply(o.get("config"), was.OS)
		if err != nil {
			return nil, err
		}
		o.put("config", run)
	}
	root, err := parseObject(o.get("rootfs"))
	if err != nil {
		return nil, fmt.Errorf("image config: rootfs: %w", err)
	}
	root.set("type", "layers")
	root.set("diff_ids", append([]digest.Digest{}, diffIDs...))
	o.put("rootfs", root.bytes())
	o.put("history", arrayOf(append(history, encodeJSON(entry))))

	made := o.bytes()
	return made, checkConfig(made, diffIDs)
}

// oldHistory gives the entries of the base's history, less those of the layers
// that are squashed. After it every layer has its entry.
//
// Many bases have no history, or one that does not fit their layers. As in
// BuildKit (exporter/containerimage/writer.go, normalizeLayersAndHistory),
// entries are taken for the layers from the lowest up: what is missing is added
// at the end, what is left over is marked as empty. Everyone who counts along
// the history then finds the new layer's entry at the new layer.
func oldHistory(o *object, layers, squash int) ([]json.RawMessage, error) {
	var all []json.RawMessage
	if raw := o.get("history"); !isNull(raw) {
		if err := json.Unmarshal(raw, &all); err != nil {
			return nil, fmt.Errorf("image config: history: %w", err)
		}
	}
	var kept []json.RawMessage
	have := 0
	for i, raw := range all {
		empty, err := isEmptyLayer(raw)
		if err != nil {
			return nil, fmt.Errorf("image config: history: entry %d: %w", i, err)
		}
		if !empty {
			if have++; have > layers {
				e, err := parseObject(raw)
				if err != nil {
					return nil, fmt.Errorf("image config: history: entry %d: %w", i, err)
				}
				e.set("empty_layer", true)
				raw, empty = e.bytes(), true
			}
		}
		// What was squashed leaves the entries of what only changed the config:
		// those changes are still in force.
		if empty || have <= layers-squash {
			kept = append(kept, raw)
		}
	}
	neutral := &object{}
	if created := o.get("created"); !isNull(created) {
		neutral.put("created", created)
	}
	for ; have < layers-squash; have++ {
		kept = append(kept, neutral.bytes())
	}
	return kept, nil
}

func isEmptyLayer(raw json.RawMessage) (bool, error) {
	var h ocispec.History
	err := json.Unmarshal(raw, &h)
	return h.EmptyLayer, err
}

// checkConfig reads a config as others will and holds it against what every
// reader takes for granted: as many entries of the history that made a layer as
// there are layers.
func checkConfig(raw []byte, diffIDs []digest.Digest) error {
	c, err := image.ParseConfig(raw)
	if err != nil {
		return fmt.Errorf("the new image's: %w", err)
	}
	have, err := c.DiffIDs(len(diffIDs))
	if err != nil {
		return fmt.Errorf("the new image's: %w", err)
	}
	for i, d := range diffIDs {
		if have[i] != d {
			return fmt.Errorf("the new image's config names %s where %s should be", have[i], d)
		}
	}
	made := 0
	for _, h := range c.History {
		if !h.EmptyLayer {
			made++
		}
	}
	if made != len(diffIDs) {
		return fmt.Errorf("the new image's history has %d layers, its config %d", made, len(diffIDs))
	}
	return nil
}
