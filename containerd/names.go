package containerd

import (
	"context"
	"fmt"
	"maps"
	"slices"

	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	"github.com/containerd/containerd/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
)

// The CRI plugin's namespace, and its mark on images: those without it are none of
// the kubelet's.
const (
	criNamespace = "k8s.io"
	criLabel     = "io.cri-containerd.image"
	criManaged   = "managed"
)

// setNames gives the image its names, and reports whether the one that was asked for is
// new or stood for something else.
func (c *Client) setNames(ctx context.Context, p *parsed) (changed bool, err error) {
	labels := map[string]string{}
	if c.Namespace == criNamespace {
		labels[criLabel] = criManaged
	}
	for _, n := range c.names(p) {
		new, err := c.setName(ctx, &imagesapi.Image{
			Name: n, Labels: labels,
			Target: &types.Descriptor{MediaType: p.target.MediaType, Digest: p.target.Digest.String(), Size: p.target.Size},
		})
		if err != nil {
			return changed, fmt.Errorf("name %s: %w", n, plain(err))
		}
		changed = changed || new && n == p.name.String()
	}
	return changed, nil
}

// names gives what clients look an image up by. The kubelet's containers name it by
// its config's digest, which CRI has as a name of its own, and its lists show it by
// repository and digest. They come in CRI's order: who finds the name finds the ID.
func (c *Client) names(p *parsed) []string {
	if c.Namespace != criNamespace {
		return []string{p.name.String()}
	}
	all := []string{p.manifest.ConfigDesc.Digest.String(), p.name.String(), p.name.WithDigest(p.target.Digest).String()}
	return slices.Compact(all)
}

// setName makes an entry in the list of images, or changes the one that is there.
func (c *Client) setName(ctx context.Context, im *imagesapi.Image) (changed bool, err error) {
	for {
		_, err := c.images.Create(ctx, &imagesapi.CreateImageRequest{Image: im})
		if status.Code(err) != codes.AlreadyExists {
			return true, err
		}
		old, err := c.images.Get(ctx, &imagesapi.GetImageRequest{Name: im.Name})
		if status.Code(err) == codes.NotFound {
			continue // removed just now
		}
		if err != nil {
			return false, err
		}
		changed = old.Image.GetTarget().GetDigest() != im.Target.Digest
		mask := &fieldmaskpb.FieldMask{Paths: []string{"target"}}
		for _, k := range slices.Sorted(maps.Keys(im.Labels)) {
			mask.Paths = append(mask.Paths, "labels."+k)
		}
		_, err = c.images.Update(ctx, &imagesapi.UpdateImageRequest{Image: im, UpdateMask: mask})
		if status.Code(err) != codes.NotFound {
			return changed, err
		}
	}
}
