// The colour scale of anomaly maps, which gladad.report.pictures has from the same file.
import scale from '../../../src/gladad/report/colours.json';

const CHANNELS = scale.channels as [number[], number[], number[]];
export const VMAX = scale.vmax; // the scale ends at twice the limit of the map

/** Red, green and blue of 256 levels. */
export const COLOURS: [number, number, number][] = Array.from({ length: 256 }, (_, level) => {
  const place = (level / 255) * 8;
  const low = Math.min(7, Math.floor(place));
  const mix = (channel: readonly number[]) => Math.floor(channel[low]! + (place - low) * (channel[low + 1]! - channel[low]!));
  return [mix(CHANNELS[0]), mix(CHANNELS[1]), mix(CHANNELS[2])];
});

/** How much of a level's colour is laid over the image: none below half of the limit. */
export const strength = (level: number) => 0.75 * Math.min(1, Math.max(0, (level * VMAX) / 255 - 0.5));
