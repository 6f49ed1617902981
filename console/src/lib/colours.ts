// The colour scale of anomaly maps, the same as gladad.report.pictures has; a test compares them.
export const CHANNELS = [
  [0, 34, 88, 139, 188, 227, 249, 248, 252],
  [0, 11, 16, 35, 55, 89, 142, 202, 254],
  [6, 76, 110, 105, 84, 50, 9, 52, 164],
] as const;
export const VMAX = 2; // the scale ends at twice the limit of the map

/** Red, green and blue of 256 levels. */
export const COLOURS: [number, number, number][] = Array.from({ length: 256 }, (_, level) => {
  const place = (level / 255) * 8;
  const low = Math.min(7, Math.floor(place));
  const mix = (channel: readonly number[]) => Math.floor(channel[low]! + (place - low) * (channel[low + 1]! - channel[low]!));
  return [mix(CHANNELS[0]), mix(CHANNELS[1]), mix(CHANNELS[2])];
});

/** How much of a level's colour is laid over the image: none below half of the limit. */
export const strength = (level: number) => 0.75 * Math.min(1, Math.max(0, (level * VMAX) / 255 - 0.5));
